"""From logits to the next token. Options combine in this order:

repetition penalty, frequency and presence penalty, (bias, forbidden ids, grammar,) temperature, top-k, typical-p,
top-p, min-p, draw. Each filter sees what the ones before have left.

The randomness of a draw is one given uniform number a row, so the same numbers draw the same tokens in both frameworks.
No filter sorts the vocabulary: a bisection over the bits of a float finds the last value that is kept.

Shapes: B rows, V vocabulary, C groups of L neighbouring tokens, the last one filled up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GROUP = 128
"""L: sums run over groups side by side, which a CPU vectorises, and a place is found by group first."""


class Knobs(NamedTuple):
    """The options of `sample` as arrays, one value a row; the neutral values are those of `sample`."""

    temperature: Float[Tensor, " b"]
    top_k: Int[Tensor, " b"]
    typical_p: Float[Tensor, " b"]
    top_p: Float[Tensor, " b"]
    min_p: Float[Tensor, " b"]
    repetition_penalty: Float[Tensor, " b"]
    frequency_penalty: Float[Tensor, " b"]
    presence_penalty: Float[Tensor, " b"]


def sample(
    logits_BV: Float[Tensor, "b v"],
    uniform_B: Float[Tensor, " b"] | None = None,
    seen_BV: Bool[Tensor, "b v"] | None = None,
    counts_BV: Int[Tensor, "b v"] | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    typical_p: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> Int[Tensor, " b"]:
    """The next token of each row, with the same options for all of them.

    Args:
        logits_BV: float32 or wider.
        uniform_B: numbers in [0, 1); not needed at temperature 0.
        seen_BV: tokens of the prompt and the text; needed with a repetition penalty.
        counts_BV: how often a token stands in the text; needed with a frequency or presence penalty.
        temperature: divides the logits; 0 takes the largest (`greedy`) and does no other work.
        top_k: 0 keeps all.
        typical_p, top_p: 1 keeps all.
        min_p: 0 keeps all.
        repetition_penalty: 1 changes nothing.
        frequency_penalty, presence_penalty: 0 changes nothing.
    """
    if repetition_penalty != 1.0:
        assert seen_BV is not None
        logits_BV = penalise_repetition(logits_BV, seen_BV, repetition_penalty)
    if frequency_penalty or presence_penalty:
        assert counts_BV is not None
        logits_BV = penalise_counts(logits_BV, counts_BV, frequency_penalty, presence_penalty)
    if temperature == 0:
        return greedy(logits_BV)
    assert uniform_B is not None
    logits_BV = over_temperature(logits_BV, temperature)
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = keep_top_k(logits_BV, top_k)
    if typical_p < 1:
        logits_BV = keep_typical_p(logits_BV, typical_p)
    if top_p < 1:
        logits_BV = keep_top_p(logits_BV, top_p)
    if min_p > 0:
        logits_BV = keep_min_p(logits_BV, min_p)
    return draw(logits_BV, uniform_B)


def penalised_rows(
    logits_BV: Float[Tensor, "b v"], seen_BV: Bool[Tensor, "b v"], counts_BV: Int[Tensor, "b v"], knobs: Knobs
) -> Float[Tensor, "b v"]:
    """Logits after the three penalties, each row with its own; rows without any cost nothing."""
    wanted = (knobs.repetition_penalty != 1) | (knobs.frequency_penalty != 0) | (knobs.presence_penalty != 0)

    def penalise(logits_BV: Tensor) -> Tensor:
        repeated, frequency, presence = (_column(x) for x in knobs[5:])
        punished_BV = penalise_repetition(logits_BV, seen_BV, repeated)
        return torch.where(_column(wanted), penalise_counts(punished_BV, counts_BV, frequency, presence), logits_BV)

    return _where_any(wanted, penalise, logits_BV)


def filtered_rows(logits_BV: Float[Tensor, "b v"], knobs: Knobs) -> Float[Tensor, "b v"]:
    """Logits over the temperature, those that no filter of the row keeps at -inf.

    At temperature 0 only the largest is left. A filter runs when some row asks for it.
    """
    greedy_B, v = knobs.temperature == 0, logits_BV.shape[-1]
    top_k = torch.where(greedy_B, 1, torch.where(knobs.top_k > 0, knobs.top_k.clamp(max=v), v))
    logits_BV = over_temperature(logits_BV, _column(torch.where(greedy_B, 1, knobs.temperature)))
    for wanted_B, keep, amount_B in (
        (top_k < v, keep_top_k, top_k),
        (~greedy_B & (knobs.typical_p < 1), keep_typical_p, knobs.typical_p),
        (~greedy_B & (knobs.top_p < 1), keep_top_p, knobs.top_p),
        (~greedy_B & (knobs.min_p > 0), keep_min_p, knobs.min_p),
    ):

        def apply(
            logits_BV: Tensor, keep: Any = keep, amount_B: Tensor = amount_B, wanted_B: Tensor = wanted_B
        ) -> Tensor:
            return torch.where(_column(wanted_B), keep(logits_BV, _column(amount_B)), logits_BV)

        logits_BV = _where_any(wanted_B, apply, logits_BV)
    return logits_BV


def greedy(logits_BV: Float[Tensor, "b v"]) -> Int[Tensor, " b"]:
    """The token with the largest logit; of equal ones the lowest."""
    return _first(logits_BV == logits_BV.amax(dim=-1, keepdim=True))


def over_temperature(logits_BV: Float[Tensor, "b v"], temperature: Any) -> Float[Tensor, "b v"]:
    """Distance of each logit to the largest of its row, over the temperature: 0 for the largest, else negative.

    The difference is taken first, so a small temperature overflows to -inf and never to inf - inf. As the temperature
    goes to 0 only the largest stay.
    """
    top_B1 = logits_BV.amax(dim=-1, keepdim=True)
    finite_B1 = torch.where(top_B1.isfinite(), top_B1, 0)  # a row of -inf stays one
    cold_BV = (logits_BV - finite_B1) / _as(temperature, logits_BV)
    return torch.where(logits_BV == finite_B1, 0, cold_BV)


def penalise_repetition(logits_BV: Float[Tensor, "b v"], seen_BV: Bool[Tensor, "b v"], penalty: Any) -> Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones (Keskar et al. 2019, 4.1).

    The penalty is a number, or one a row [B, 1], as the amounts of all filters here.
    """
    penalty = _as(penalty, logits_BV)
    punished_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, punished_BV, logits_BV)


def penalise_counts(
    logits_BV: Float[Tensor, "b v"], counts_BV: Int[Tensor, "b v"], frequency: Any, presence: Any
) -> Float[Tensor, "b v"]:
    """Take from a logit `frequency` for each time that its token stands in the text, and `presence` once (OpenAI)."""
    times_BV = counts_BV.to(logits_BV.dtype)
    once_BV = (counts_BV > 0).to(logits_BV.dtype)
    return logits_BV - times_BV * _as(frequency, logits_BV) - once_BV * _as(presence, logits_BV)


def keep_top_k(logits_BV: Float[Tensor, "b v"], k: Any) -> Float[Tensor, "b v"]:
    """Keep the k largest logits (Fan et al. 2018); of equal ones the lower tokens. What is dropped becomes -inf."""
    kept_BV = first_until(logits_BV, torch.ones_like(logits_BV), _as(k, logits_BV))
    return logits_BV.masked_fill(~kept_BV, -torch.inf)


def keep_top_p(logits_BV: Float[Tensor, "b v"], p: Any) -> Float[Tensor, "b v"]:
    """Keep the fewest largest tokens whose mass reaches p (Holtzman et al. 2020), the one that crosses it included.

    Of equal ones the lower tokens come first. What is dropped becomes -inf; the largest is always kept.
    """
    weights_BV = _weights(logits_BV)
    amount_B1 = _as(p, logits_BV) * _total(_groups(weights_BV))[:, None]
    return logits_BV.masked_fill(~first_until(logits_BV, weights_BV, amount_B1), -torch.inf)


def keep_typical_p(logits_BV: Float[Tensor, "b v"], p: Any) -> Float[Tensor, "b v"]:
    """Keep the fewest tokens, those of nearly the expected surprise first, whose mass reaches p (Meister et al. 2023).

    The distance is `|-log q - H|` of a token's probability q and the entropy H (equation 5); of equal ones the lower
    tokens come first. What is dropped becomes -inf.
    """
    weights_BV = _weights(logits_BV)
    total_B1 = _total(_groups(weights_BV))[:, None]
    surprise_BV = torch.log(total_B1) - (logits_BV - logits_BV.amax(dim=-1, keepdim=True))
    probable_BV = torch.where(weights_BV > 0, weights_BV * surprise_BV, 0)
    entropy_B1 = _total(_groups(probable_BV))[:, None] / total_B1
    nearness_BV = torch.where(weights_BV > 0, -(surprise_BV - entropy_B1).abs(), -torch.inf)
    amount_B1 = _as(p, logits_BV) * total_B1
    return logits_BV.masked_fill(~first_until(nearness_BV, weights_BV, amount_B1), -torch.inf)


def keep_min_p(logits_BV: Float[Tensor, "b v"], p: Any) -> Float[Tensor, "b v"]:
    """Keep the tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return logits_BV.masked_fill(_weights(logits_BV) < _as(p, logits_BV), -torch.inf)


def first_until(
    keys_BV: Float[Tensor, "b v"], weights_BV: Float[Tensor, "b v"], amount: Float[Tensor, "..."]
) -> Bool[Tensor, "b v"]:
    """Take tokens by falling keys, of equal ones the lower first, until their weights reach the amount.

    The token that reaches it is taken. It is the set that sorting gives, but for amounts within rounding of a sum.

    Args:
        amount: positive; a number or one a row [B, 1].
    """
    order_BV = _ordered(keys_BV)
    limits = torch.iinfo(order_BV.dtype)
    order_BCL, weights_BCL = _groups(order_BV, limits.min), _groups(weights_BV)
    amount_B = amount.expand(keys_BV.shape[0], 1)[:, 0]

    def beyond(at_B: Tensor) -> Tensor:
        return _total(torch.where(order_BCL > at_B[:, None, None], weights_BCL, 0))

    # The last key taken is the least one beyond which the weights do not reach the amount: halve what lies between.
    last_B = order_BCL.amax(dim=(1, 2))
    low_B = torch.full_like(last_B, limits.min)
    for _ in range(limits.bits):
        middle_B = (low_B & last_B) + ((low_B ^ last_B) >> 1)
        short_B = beyond(middle_B) < amount_B
        low_B, last_B = torch.where(short_B, low_B, middle_B), torch.where(short_B, middle_B, last_B)

    # Of the tokens with that key as many are taken as the amount still needs.
    last_B1 = last_B[:, None]
    tied_BCL = torch.where(order_BCL == last_B[:, None, None], weights_BCL, 0)
    end_B1 = _reach(tied_BCL, amount_B - beyond(last_B))[:, None]
    index_V = torch.arange(keys_BV.shape[-1], device=keys_BV.device)
    return (order_BV > last_B1) | ((order_BV == last_B1) & (index_V <= end_B1))


def draw(logits_BV: Float[Tensor, "b v"], uniform_B: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Inverse-CDF sampling: the first token at which the cumulative mass reaches `(1 - u)` of the whole.

    `1 - u` is positive, so a token without mass is never drawn, however the sums round.
    """
    weights_BCL = _groups(_weights(logits_BV))
    whole_B = _running(weights_BCL.sum(dim=-1))[:, -1]
    return _reach(weights_BCL, (1 - uniform_B.to(whole_B.dtype)) * whole_B)


def _reach(weights_BCL: Tensor, amount_B: Tensor) -> Tensor:
    """The first token [B] at which the cumulative weight reaches the amount; else the last one that has weight."""
    sums_BC = weights_BCL.sum(dim=-1)
    reached_BC = _running(sums_BC)
    group_B1 = _first_or_last(reached_BC >= amount_B[:, None], sums_BC > 0)[:, None]
    before_B1 = torch.where(group_B1 > 0, reached_BC.gather(1, (group_B1 - 1).clamp(min=0)), 0)
    weights_BL = weights_BCL.take_along_dim(group_B1[..., None], dim=1)[:, 0]
    within_BL = before_B1 + _running(weights_BL)
    return group_B1[:, 0] * GROUP + _first_or_last(within_BL >= amount_B[:, None], weights_BL > 0)


def _running(x_BN: Tensor) -> Tensor:
    """Cumulative sums, in the order of the other framework."""
    n = x_BN.shape[-1]
    if n <= GROUP:
        return x_BN @ torch.ones(n, n, dtype=x_BN.dtype, device=x_BN.device).triu()
    within_BCL = _groups(x_BN) @ torch.ones(GROUP, GROUP, dtype=x_BN.dtype, device=x_BN.device).triu()
    before_BC = torch.nn.functional.pad(_running(within_BCL[..., -1])[:, :-1], (1, 0))
    return (within_BCL + before_BC[..., None]).reshape(x_BN.shape[0], -1)[:, :n]


def _first_or_last(reached: Tensor, some: Tensor) -> Tensor:
    """Index of the first that has something and reaches, else of the last that has something."""
    last_B = some.shape[-1] - 1 - _first(some.flip(-1)).clamp(max=some.shape[-1] - 1)
    both = reached & some
    return torch.where(both.any(dim=-1), _first(both), last_B)


def _first(true_BC: Tensor) -> Tensor:
    """Index of the first True of each row; `argmax` leaves open which of equal values it takes."""
    index_C = torch.arange(true_BC.shape[-1], device=true_BC.device)
    return torch.where(true_BC, index_C, true_BC.shape[-1]).amin(dim=-1)


def _weights(logits_BV: Tensor) -> Tensor:
    """Probabilities times a number of each row: the likeliest token weighs 1."""
    return torch.exp(logits_BV - logits_BV.amax(dim=-1, keepdim=True))


def _groups(x_BV: Tensor, fill: Any = 0) -> Tensor:
    """[B, C, L]."""
    short = -x_BV.shape[-1] % GROUP
    return torch.nn.functional.pad(x_BV, (0, short), value=fill).reshape(x_BV.shape[0], -1, GROUP)


def _total(x_BCL: Tensor) -> Tensor:
    """Sum of each row, over the groups first."""
    return x_BCL.sum(dim=1).sum(dim=-1)


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the floats, which must be float32 or float64; both zeros are one."""
    kind = torch.int64 if x.dtype == torch.float64 else torch.int32
    bits = torch.where(x == 0, 0, x).view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)


def _as(amount: Any, logits_BV: Tensor) -> Tensor:
    return torch.as_tensor(amount, dtype=logits_BV.dtype, device=logits_BV.device)


def _column(x_B: Tensor) -> Tensor:
    return x_B[:, None]


def _where_any(wanted_B: Tensor, apply: Any, logits_BV: Tensor) -> Tensor:
    """`apply` where a row wants it, at no cost where none does."""
    return apply(logits_BV) if wanted_B.any() else logits_BV
