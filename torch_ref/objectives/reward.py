"""The loss of a reward model on pairs, and what makes its rewards fit for a policy to chase.

A pair is two neighbouring segments of one row, as in `preference`: 2k-1 was chosen and 2k rejected.

    d = score of the chosen - score of the rejected    m = margin    s = sigmoid

Shapes: B batch, M segments of a row, P = M / 2 pairs of a row, N samples.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RewardKind = Literal["logistic", "hinge"]


class RewardLoss(NamedTuple):
    """Sums over the pairs; divide by `weight` for means."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    correct: Float[Tensor, ""]
    """How often the chosen scored higher; a pair that is a tie counts as half."""
    chosen: Float[Tensor, ""]
    """Scores of the chosen."""
    rejected: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    """Number of pairs."""


def reward_loss(
    scores_BM: Float[Tensor, "b m"],
    present_BM: Bool[Tensor, "b m"],
    margins_BP: Float[Tensor, "b p"] | None = None,
    ties_BP: Bool[Tensor, "b p"] | None = None,
    *,
    kind: RewardKind = "logistic",
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> RewardLoss:
    """Sums over pairs of a loss of Bradley and Terry's model; differentiable in `loss`.

    With q the probability that the label is right (1 - e for smoothing e, 1/2 for a tie):
    `logistic`: -q log s(d - m) - (1 - q) log s(m - d) (Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, eq. 2);
    `hinge`: q max(0, m - d) + (1 - q) max(0, d - m). Both add c (r_c + r_r)^2 for centring c (Eisenstein et al. 2023,
    section 2), which fixes the zero that differences leave open.

    Args:
        margins_BP: m of each pair, how far apart they should be; none is 0. A tie has none.
        ties_BP: pairs that were judged equally good.
    """
    present_BP = present_BM[:, 0::2] & present_BM[:, 1::2]
    chosen_BP, rejected_BP = scores_BM[:, 0::2], scores_BM[:, 1::2]
    ties_BP = torch.zeros_like(present_BP) if ties_BP is None else ties_BP
    difference_BP = chosen_BP - rejected_BP
    distance_BP = difference_BP if margins_BP is None else difference_BP - torch.where(ties_BP, 0, margins_BP)
    surrogate = torch.relu if kind == "hinge" else _softplus
    right_BP = torch.where(ties_BP, scores_BM.new_tensor(0.5), 1 - label_smoothing)
    loss_BP = right_BP * surrogate(-distance_BP) + (1 - right_BP) * surrogate(distance_BP)
    loss_BP = loss_BP + centring * (chosen_BP + rejected_BP) ** 2
    correct_BP = torch.where(ties_BP, 0.5, difference_BP > 0)
    terms = (loss_BP, correct_BP, chosen_BP, rejected_BP, torch.ones_like(loss_BP))
    return RewardLoss(*(torch.sum(torch.where(present_BP, term, 0)) for term in terms))


class Moments(NamedTuple):
    """Mean and spread of all rewards so far."""

    samples: Float[Tensor, ""]
    mean: Float[Tensor, ""]
    squares: Float[Tensor, ""]
    """Sum of squared distances from the mean."""


def add_moments(moments: Moments, rewards_N: Float[Tensor, " n"], valid_N: Bool[Tensor, " n"]) -> Moments:
    """The moments with these rewards among them (Chan et al. 1983, eq. 2.1)."""
    count = torch.sum(valid_N, dtype=rewards_N.dtype)
    mean = torch.sum(torch.where(valid_N, rewards_N, 0)) / count.clamp(min=1)
    squares = torch.sum(torch.where(valid_N, (rewards_N - mean) ** 2, 0))
    total = moments.samples + count
    share = count / total.clamp(min=1)
    distance = mean - moments.mean
    between = distance**2 * moments.samples * share
    return Moments(total, moments.mean + distance * share, moments.squares + squares + between)


def shape_rewards(
    rewards_N: Float[Tensor, " n"],
    lengths_N: Float[Tensor, " n"],
    moments: Moments | None = None,
    *,
    clip: float = 0.0,
    length_weight: float = 0.0,
    eps: float = 1e-8,
) -> Float[Tensor, " n"]:
    """`clip((R - mean) / sqrt(var + eps)) - length_weight * length`: all samples by the same numbers, so order is kept.

    Args:
        moments: of all rewards so far, these included; variance with ddof 1. None leaves the scale.
        clip: largest size after scaling; 0 for none. Equal above it, so the order is kept weakly.
    """
    if moments is not None:
        variance = moments.squares / (moments.samples - 1).clamp(min=1)
        rewards_N = (rewards_N - moments.mean) / torch.sqrt(variance + eps)
    if clip:
        rewards_N = torch.clamp(rewards_N, -clip, clip)
    return rewards_N - length_weight * lengths_N


def _softplus(x_BP: Tensor) -> Tensor:
    """-log s(-x). Torch's own gives x itself above 20, which is 2e-9 off."""
    return torch.logaddexp(x_BP, torch.zeros_like(x_BP))
