"""From logits to the next token. Options combine in this order, which is that of transformers:

repetition penalty, temperature, top-k, top-p, min-p, draw.

The randomness of a draw is one given uniform number a row, so the same numbers draw the same tokens in both frameworks.

Shapes: B rows, V vocabulary, C candidates: the tokens that are left, C <= V.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sample(
    logits_BV: Float[Tensor, "b v"],
    uniform_B: Float[Tensor, " b"] | None = None,
    seen_BV: Bool[Tensor, "b v"] | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Int[Tensor, " b"]:
    """The next token of each row.

    Args:
        logits_BV: float32 or wider.
        uniform_B: numbers in [0, 1); not needed at temperature 0.
        seen_BV: tokens that the penalty concerns; not needed without one.
        temperature: divides the logits; 0 takes the largest (`greedy`) and does no other work.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        repetition_penalty: 1 changes nothing.
    """
    if repetition_penalty != 1.0:
        assert seen_BV is not None
        logits_BV = penalise_repetition(logits_BV, seen_BV, repetition_penalty)
    if temperature == 0:
        return greedy(logits_BV)
    assert uniform_B is not None
    logits_BC, ids_BC = logits_BV / temperature, None
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BC, ids_BC = largest(logits_BC, top_k)
    if top_p < 1:
        if ids_BC is None:
            logits_BC, ids_BC = largest(logits_BC, logits_BC.shape[-1])
        logits_BC = keep_top_p(logits_BC, top_p)
    if min_p > 0:
        logits_BC = keep_min_p(logits_BC, min_p)
    choice_B = draw(logits_BC, uniform_B)
    return choice_B if ids_BC is None else ids_BC.gather(-1, choice_B[:, None])[:, 0]


def greedy(logits_BV: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """The token with the largest logit; of equal ones the lowest."""
    return _first(logits_BV == logits_BV.amax(dim=-1, keepdim=True))


def penalise_repetition(
    logits_BV: Float[Tensor, "b v"], seen_BV: Bool[Tensor, "b v"], penalty: float
) -> Float[Tensor, "b v"]:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones (Keskar et al. 2019, 4.1)."""
    punished_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, punished_BV, logits_BV)


def largest(logits_BV: Float[Tensor, "b v"], k: int) -> tuple[Float[Tensor, "b c"], Int[Tensor, "b c"]]:
    """The k largest logits (Fan et al. 2018) and their tokens, falling; of equal ones the lower token comes first.

    A stable sort, because `torch.topk` leaves the order of equal values open.
    """
    falling_BV, ids_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    return falling_BV[:, :k], ids_BV[:, :k]


def keep_top_p(falling_BC: Float[Tensor, "b c"], p: float) -> Float[Tensor, "b c"]:
    """Keep the fewest largest tokens whose mass reaches p (Holtzman et al. 2020), the one that crosses it included.

    Takes falling logits; what is dropped becomes -inf. The first is always kept.
    """
    probabilities = _softmax(falling_BC)
    keep = probabilities.cumsum(dim=-1) - probabilities < p  # mass of the larger ones
    keep[:, 0] = True
    return falling_BC.masked_fill(~keep, -torch.inf)


def keep_min_p(logits_BC: Float[Tensor, "b c"], p: float) -> Float[Tensor, "b c"]:
    """Keep the tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    top_B1 = logits_BC.amax(dim=-1, keepdim=True)
    return logits_BC.masked_fill(torch.exp(logits_BC - top_B1) < p, -torch.inf)


def draw(logits_BC: Float[Tensor, "b c"], uniform_B: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Inverse-CDF sampling: the first candidate at which the cumulative mass reaches `(1 - u)` of the whole.

    `1 - u` is positive, so a candidate without mass is never drawn, however the sums round.
    """
    mass_BC = _softmax(logits_BC)
    reached_BC = torch.where(mass_BC > 0, mass_BC.cumsum(dim=-1), 0)
    threshold_B1 = (1 - uniform_B.to(mass_BC.dtype))[:, None] * reached_BC.amax(dim=-1, keepdim=True)
    return _first(reached_BC >= threshold_B1)


def _first(true_BC: Tensor) -> Tensor:
    """Index of the first True of each row; `argmax` leaves open which of equal values it takes."""
    index_C = torch.arange(true_BC.shape[-1], device=true_BC.device)
    return torch.where(true_BC, index_C, true_BC.shape[-1]).amin(dim=-1)


def _softmax(logits_BC: Tensor) -> Tensor:
    weights = torch.exp(logits_BC - logits_BC.amax(dim=-1, keepdim=True))
    return weights / weights.sum(dim=-1, keepdim=True)
