"""The loss of a reward model on pairs, and what makes its rewards fit for a policy to chase.

A pair is two neighbouring segments of one row, as in `preference`: 2k-1 was chosen and 2k rejected.

    d = score of the chosen - score of the rejected    m = margin    s = sigmoid

Shapes: B batch, M segments of a row, P = M / 2 pairs of a row, N samples.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

RewardKind = Literal["logistic", "hinge"]


class RewardLoss(NamedTuple):
    """Sums over the pairs; divide by `weight` for means."""

    loss: Float[Array, ""]
    """What is minimised."""
    correct: Float[Array, ""]
    """How often the chosen scored higher; a pair that is a tie counts as half."""
    chosen: Float[Array, ""]
    """Scores of the chosen."""
    rejected: Float[Array, ""]
    weight: Float[Array, ""]
    """Number of pairs."""


def reward_loss(
    scores_BM: Float[Array, "b m"],
    present_BM: Bool[Array, "b m"],
    margins_BP: Float[Array, "b p"] | None = None,
    ties_BP: Bool[Array, "b p"] | None = None,
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
    ties_BP = jnp.zeros_like(present_BP) if ties_BP is None else ties_BP
    difference_BP = chosen_BP - rejected_BP
    distance_BP = difference_BP if margins_BP is None else difference_BP - jnp.where(ties_BP, 0, margins_BP)
    surrogate = jax.nn.relu if kind == "hinge" else jax.nn.softplus  # softplus(-x) = -log s(x)
    right_BP = jnp.where(ties_BP, 0.5, 1 - label_smoothing).astype(scores_BM.dtype)
    loss_BP = right_BP * surrogate(-distance_BP) + (1 - right_BP) * surrogate(distance_BP)
    loss_BP = loss_BP + centring * (chosen_BP + rejected_BP) ** 2
    correct_BP = jnp.where(ties_BP, 0.5, difference_BP > 0)
    terms = (loss_BP, correct_BP, chosen_BP, rejected_BP, jnp.ones_like(loss_BP))
    return RewardLoss(*(jnp.sum(jnp.where(present_BP, term, 0)) for term in terms))


class Moments(NamedTuple):
    """Mean and spread of all rewards so far."""

    samples: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]
    """Sum of squared distances from the mean."""


def add_moments(moments: Moments, rewards_N: Float[Array, " n"], valid_N: Bool[Array, " n"]) -> Moments:
    """The moments with these rewards among them (Chan et al. 1983, eq. 2.1)."""
    count = jnp.sum(valid_N, dtype=rewards_N.dtype)
    mean = jnp.sum(jnp.where(valid_N, rewards_N, 0)) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(valid_N, (rewards_N - mean) ** 2, 0))
    total = moments.samples + count
    share = count / jnp.maximum(total, 1)
    distance = mean - moments.mean
    between = distance**2 * moments.samples * share
    return Moments(total, moments.mean + distance * share, moments.squares + squares + between)


def shape_rewards(
    rewards_N: Float[Array, " n"],
    lengths_N: Float[Array, " n"],
    moments: Moments | None = None,
    *,
    clip: float = 0.0,
    length_weight: float = 0.0,
    eps: float = 1e-8,
) -> Float[Array, " n"]:
    """`clip((R - mean) / sqrt(var + eps)) - length_weight * length`: all samples by the same numbers, so order is kept.

    Args:
        moments: of all rewards so far, these included; variance with ddof 1. None leaves the scale.
        clip: largest size after scaling; 0 for none. Equal above it, so the order is kept weakly.
    """
    if moments is not None:
        variance = moments.squares / jnp.maximum(moments.samples - 1, 1)
        rewards_N = (rewards_N - moments.mean) / jnp.sqrt(variance + eps)
    if clip:
        rewards_N = jnp.clip(rewards_N, -clip, clip)
    return rewards_N - length_weight * lengths_N
