"""Losses of preference learning, from sums of log-probabilities over whole completions.

A pair is two neighbouring segments of one row: 2k-1 was chosen and 2k rejected. So all that a pair needs stands in one
row of [B, M], nothing is gathered between devices, and rows may be packed. A pair that is not there has a count of 0.

    L = sum of the completion's log-probabilities    n = how many they are    r = L - L under the reference
    D = r of the chosen - r of the rejected          s = sigmoid              b = beta

Shapes: B batch, M segments of a row, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

PreferenceKind = Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo"]
NO_REFERENCE = ("simpo", "orpo")
"""Losses that need no reference model."""


class PreferenceLoss(NamedTuple):
    """Sums over the pairs; divide by `weight` for means."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    chosen_reward: Float[Tensor, ""]
    """b r of the chosen: of its length mean for ipo and simpo; L / n itself for orpo."""
    rejected_reward: Float[Tensor, ""]
    correct: Float[Tensor, ""]
    """How often the chosen had the larger reward."""
    chosen_logp: Float[Tensor, ""]
    """L of the chosen: it may fall while the margin grows."""
    rejected_logp: Float[Tensor, ""]
    chosen_length: Float[Tensor, ""]
    rejected_length: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    """Number of pairs."""


class _Side(NamedTuple):
    """One completion of each pair."""

    logps: Float[Tensor, "b p"]
    """L."""
    ratio: Float[Tensor, "b p"]
    """r."""
    tokens: Float[Tensor, "b p"]
    """n, at least 1."""

    @property
    def mean(self) -> Float[Tensor, "b p"]:
        """L / n."""
        return self.logps / self.tokens


def preference_loss(
    logps_BM: Float[Tensor, "b m"],
    counts_BM: Float[Tensor, "b m"],
    reference_BM: Float[Tensor, "b m"] | None,
    *,
    kind: PreferenceKind = "dpo",
    beta: float = 0.1,
    label_noise: float = 0.0,
    gamma: float = 0.5,
    odds_weight: float = 0.1,
    sft_weight: float = 0.0,
) -> PreferenceLoss:
    """Sums over pairs of a loss of the DPO family; differentiable in `loss`.

    | kind | loss of a pair | source |
    |---|---|---|
    | dpo | -log s(b D) | Rafailov et al. 2023, eq. 7 |
    | cdpo | -(1 - e) log s(b D) - e log s(-b D) | Mitchell 2023, eq. 3 |
    | robust | [-(1 - e) log s(b D) + e log s(-b D)] / (1 - 2 e) | Chowdhury et al. 2024, eq. 12 |
    | ipo | (r_c / n_c - r_r / n_r - 1 / (2 b))^2 | Azar et al. 2023, eq. 17, with length means |
    | hinge | max(0, 1 - b D) | Zhao et al. 2023, eq. 10 |
    | simpo | -log s(b (L_c / n_c - L_r / n_r) - g) | Meng et al. 2024, eq. 6 |
    | orpo | -L_c / n_c - l log s(o_c - o_r), o = a - log(1 - exp a), a = L / n | Hong et al. 2024, eq. 4 to 7 |

    Args:
        logps_BM: L of each segment.
        counts_BM: n of each segment; 0 where the row has no such segment.
        reference_BM: L under the frozen reference; None for `simpo` and `orpo`.
        label_noise: e, the share of pairs whose label is believed wrong (cdpo, robust).
        gamma: g, the margin that simpo asks for.
        odds_weight: l of orpo.
        sft_weight: adds this times -L_c / n_c to any loss (Pang et al. 2024, eq. 1).
    """
    present_BP = (counts_BM[:, 0::2] > 0) & (counts_BM[:, 1::2] > 0)
    ratio_BM = logps_BM if reference_BM is None else logps_BM - reference_BM.detach()
    chosen, rejected = (_side(logps_BM, ratio_BM, counts_BM, present_BP, first) for first in (0, 1))
    scores = _scores(chosen, kind, beta), _scores(rejected, kind, beta)
    if kind == "orpo":
        odds_BP = _log_odds(chosen.mean) - _log_odds(rejected.mean)
        loss_BP = -chosen.mean - odds_weight * functional.logsigmoid(odds_BP)
    else:
        loss_BP = _margin_loss(scores[0] - scores[1], kind, beta, label_noise, gamma)
    loss_BP = loss_BP - sft_weight * chosen.mean
    correct_BP = (scores[0] > scores[1]).to(loss_BP.dtype)
    terms = (loss_BP, *scores, correct_BP, chosen.logps, rejected.logps, chosen.tokens, rejected.tokens)
    return PreferenceLoss(*(_masked_sum(term, present_BP) for term in (*terms, torch.ones_like(loss_BP))))


def pair_sums(terms: PreferenceLoss) -> dict[str, Float[Tensor, ""]]:
    """The sums over pairs by their names in `metrics.jsonl`."""
    found: dict[str, Float[Tensor, ""]] = terms._asdict()
    return found | {"accuracy": found.pop("correct"), "margin": terms.chosen_reward - terms.rejected_reward}


def _side(
    logps_BM: Float[Tensor, "b m"],
    ratio_BM: Float[Tensor, "b m"],
    counts_BM: Float[Tensor, "b m"],
    present_BP: Bool[Tensor, "b p"],
    first: int,
) -> _Side:
    """Every second segment. Where there is no pair stand numbers whose losses and gradients are finite."""
    logps_BP, ratio_BP = (torch.where(present_BP, x[:, first::2], -1) for x in (logps_BM, ratio_BM))
    return _Side(logps_BP, ratio_BP, torch.where(present_BP, counts_BM[:, first::2], 1))


def _scores(side: _Side, kind: PreferenceKind, beta: float) -> Float[Tensor, "b p"]:
    """The implicit reward, in which a pair is in the right order or not."""
    if kind == "orpo":
        return side.mean
    if kind == "simpo":
        return beta * side.mean
    return beta * (side.ratio / side.tokens if kind == "ipo" else side.ratio)


def _margin_loss(
    margin_BP: Float[Tensor, "b p"], kind: PreferenceKind, beta: float, noise: float, gamma: float
) -> Float[Tensor, "b p"]:
    """The loss of the difference of two implicit rewards."""
    right_BP, wrong_BP = functional.logsigmoid(margin_BP), functional.logsigmoid(-margin_BP)
    losses = {
        "dpo": lambda: -right_BP,
        "cdpo": lambda: -(1 - noise) * right_BP - noise * wrong_BP,
        "robust": lambda: (-(1 - noise) * right_BP + noise * wrong_BP) / (1 - 2 * noise),
        "ipo": lambda: (margin_BP / beta - 1 / (2 * beta)) ** 2,
        "hinge": lambda: torch.relu(1 - margin_BP),
        "simpo": lambda: -functional.logsigmoid(margin_BP - gamma),
    }
    return losses[kind]()


def _log_odds(mean_BP: Float[Tensor, "b p"]) -> Float[Tensor, "b p"]:
    """log(p / (1 - p)) for a log-probability below 0."""
    return mean_BP - torch.log(-torch.expm1(mean_BP))


def _masked_sum(x_BP: Tensor, mask_BP: Bool[Tensor, "b p"]) -> Float[Tensor, ""]:
    return torch.sum(torch.where(mask_BP, x_BP, 0))
