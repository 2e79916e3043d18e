"""From logits to the next token. Options combine in this order:

repetition penalty, frequency and presence penalty, (bias, forbidden ids, grammar,) temperature, top-k, typical-p,
top-p, min-p, draw. Each filter sees what the ones before have left.

The randomness of a draw is one given uniform number a row, so the same numbers draw the same tokens in both frameworks.
No filter sorts the vocabulary: a bisection over the bits of a float finds the last value that is kept.

Shapes: B rows, V vocabulary, C groups of L neighbouring tokens, the last one filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.typed_jax import cond, fori_loop, pad

GROUP = 128
"""L: sums run over groups side by side, which a CPU vectorises, and a place is found by group first."""


class Knobs(NamedTuple):
    """The options of `sample` as arrays, one value a row; the neutral values are those of `sample`."""

    temperature: Float[Array, " b"]
    top_k: Int[Array, " b"]
    typical_p: Float[Array, " b"]
    top_p: Float[Array, " b"]
    min_p: Float[Array, " b"]
    repetition_penalty: Float[Array, " b"]
    frequency_penalty: Float[Array, " b"]
    presence_penalty: Float[Array, " b"]


def sample(
    logits_BV: Float[Array, "b v"],
    uniform_B: Float[Array, " b"] | None = None,
    seen_BV: Bool[Array, "b v"] | None = None,
    counts_BV: Int[Array, "b v"] | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    typical_p: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> Int[Array, " b"]:
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
    logits_BV: Float[Array, "b v"], seen_BV: Bool[Array, "b v"], counts_BV: Int[Array, "b v"], knobs: Knobs
) -> Float[Array, "b v"]:
    """Logits after the three penalties, each row with its own; rows without any cost nothing."""
    wanted = (knobs.repetition_penalty != 1) | (knobs.frequency_penalty != 0) | (knobs.presence_penalty != 0)

    def penalise(logits_BV: Array) -> Array:
        # Where one row has penalties the arithmetic runs over all rows; those without keep their own logits, bit for
        # bit.
        repeated, frequency, presence = (_column(x) for x in knobs[5:])
        punished_BV = penalise_repetition(logits_BV, seen_BV, repeated)
        return jnp.where(_column(wanted), penalise_counts(punished_BV, counts_BV, frequency, presence), logits_BV)

    return _where_any(wanted, penalise, logits_BV)


def filtered_rows(logits_BV: Float[Array, "b v"], knobs: Knobs) -> Float[Array, "b v"]:
    """Logits over the temperature, those that no filter of the row keeps at -inf.

    At temperature 0 only the largest is left. A filter runs when some row asks for it.
    """
    # At temperature 0, top-k of 1 leaves the largest logit alone, so that greedy and sampled rows share one program;
    # the division is by 1 there.
    greedy_B, v = knobs.temperature == 0, logits_BV.shape[-1]
    top_k = jnp.where(greedy_B, 1, jnp.where(knobs.top_k > 0, jnp.minimum(knobs.top_k, v), v))
    logits_BV = over_temperature(logits_BV, _column(jnp.where(greedy_B, 1, knobs.temperature)))
    for wanted_B, keep, amount_B in (
        (top_k < v, keep_top_k, top_k),
        (~greedy_B & (knobs.typical_p < 1), keep_typical_p, knobs.typical_p),
        (~greedy_B & (knobs.top_p < 1), keep_top_p, knobs.top_p),
        (~greedy_B & (knobs.min_p > 0), keep_min_p, knobs.min_p),
    ):

        def apply(logits_BV: Array, keep: Any = keep, amount_B: Array = amount_B, wanted_B: Array = wanted_B) -> Array:
            return jnp.where(_column(wanted_B), keep(logits_BV, _column(amount_B)), logits_BV)

        logits_BV = _where_any(wanted_B, apply, logits_BV)
    return logits_BV


def greedy(logits_BV: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The token with the largest logit; of equal ones the lowest. The last token where a logit is NaN.

    Two reductions that XLA vectorises: on a CPU a quarter of the time of its `argmax`.
    """
    v = logits_BV.shape[-1]
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    index_BV = jnp.where(logits_BV == top_B1, jnp.arange(v, dtype=jnp.int32), v)
    return jnp.minimum(jnp.min(index_BV, axis=-1), v - 1)


def over_temperature(logits_BV: Float[Array, "b v"], temperature: Any) -> Float[Array, "b v"]:
    """Distance of each logit to the largest of its row, over the temperature: 0 for the largest, else negative.

    The difference is taken first, so a small temperature overflows to -inf and never to inf - inf. As the temperature
    goes to 0 only the largest stay.
    """
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    finite_B1 = jnp.where(jnp.isfinite(top_B1), top_B1, 0)  # a row of -inf stays one
    cold_BV = (logits_BV - finite_B1) / jnp.asarray(temperature, logits_BV.dtype)
    return jnp.where(logits_BV == finite_B1, 0, cold_BV)


def penalise_repetition(logits_BV: Float[Array, "b v"], seen_BV: Bool[Array, "b v"], penalty: Any) -> Array:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones (Keskar et al. 2019, 4.1).

    The penalty is a number, or one a row [B, 1], as the amounts of all filters here.
    """
    penalty = jnp.asarray(penalty, logits_BV.dtype)
    punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, punished_BV, logits_BV)


def penalise_counts(
    logits_BV: Float[Array, "b v"], counts_BV: Int[Array, "b v"], frequency: Any, presence: Any
) -> Float[Array, "b v"]:
    """Take from a logit `frequency` for each time that its token stands in the text, and `presence` once (OpenAI)."""
    times_BV, dtype = counts_BV.astype(logits_BV.dtype), logits_BV.dtype
    once_BV = (counts_BV > 0).astype(dtype)
    return logits_BV - times_BV * jnp.asarray(frequency, dtype) - once_BV * jnp.asarray(presence, dtype)


def keep_top_k(logits_BV: Float[Array, "b v"], k: Any) -> Float[Array, "b v"]:
    """Keep the k largest logits (Fan et al. 2018); of equal ones the lower tokens. What is dropped becomes -inf."""
    ones_BV = jnp.ones_like(logits_BV)
    return jnp.where(first_until(logits_BV, ones_BV, jnp.asarray(k, logits_BV.dtype)), logits_BV, -jnp.inf)


def keep_top_p(logits_BV: Float[Array, "b v"], p: Any) -> Float[Array, "b v"]:
    """Keep the fewest largest tokens whose mass reaches p (Holtzman et al. 2020), the one that crosses it included.

    Of equal ones the lower tokens come first. What is dropped becomes -inf; the largest is always kept.
    """
    weights_BV = _weights(logits_BV)
    amount_B1 = jnp.asarray(p, logits_BV.dtype) * _total(_groups(weights_BV))[:, None]
    return jnp.where(first_until(logits_BV, weights_BV, amount_B1), logits_BV, -jnp.inf)


def keep_typical_p(logits_BV: Float[Array, "b v"], p: Any) -> Float[Array, "b v"]:
    """Keep the fewest tokens, those of nearly the expected surprise first, whose mass reaches p (Meister et al. 2023).

    The distance is `|-log q - H|` of a token's probability q and the entropy H (equation 5); of equal ones the lower
    tokens come first. What is dropped becomes -inf.
    """
    weights_BV = _weights(logits_BV)
    total_B1 = _total(_groups(weights_BV))[:, None]
    # Probabilities are weights over their sum, so -log q = log(sum) - (logit - largest). Tokens that an earlier filter
    # dropped have weight 0 and infinite surprise: 0 * inf is NaN, hence the masks.
    surprise_BV = jnp.log(total_B1) - (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    probable_BV = jnp.where(weights_BV > 0, weights_BV * surprise_BV, 0)
    entropy_B1 = _total(_groups(probable_BV))[:, None] / total_B1
    nearness_BV = jnp.where(weights_BV > 0, -jnp.abs(surprise_BV - entropy_B1), -jnp.inf)
    amount_B1 = jnp.asarray(p, logits_BV.dtype) * total_B1
    return jnp.where(first_until(nearness_BV, weights_BV, amount_B1), logits_BV, -jnp.inf)


def keep_min_p(logits_BV: Float[Array, "b v"], p: Any) -> Float[Array, "b v"]:
    """Keep the tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return jnp.where(_weights(logits_BV) >= jnp.asarray(p, logits_BV.dtype), logits_BV, -jnp.inf)


def first_until(
    keys_BV: Float[Array, "b v"], weights_BV: Float[Array, "b v"], amount: Float[Array, "..."]
) -> Bool[Array, "b v"]:
    """Take tokens by falling keys, of equal ones the lower first, until their weights reach the amount.

    The token that reaches it is taken. It is the set that sorting gives, but for amounts within rounding of a sum.

    Args:
        amount: positive; a number or one a row [B, 1].
    """
    order_BCL, weights_BCL = _groups(_ordered(keys_BV), jnp.iinfo(_bits(keys_BV)).min), _groups(weights_BV)
    amount_B = jnp.broadcast_to(amount, (keys_BV.shape[0], 1))[:, 0]

    def beyond(at_B: Array) -> Array:
        return _total(jnp.where(order_BCL > at_B[:, None, None], weights_BCL, 0))

    # The last key taken is the least one beyond which the weights do not reach the amount: halve what lies between.
    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = ends
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        short_B = beyond(middle_B) < amount_B
        return jnp.where(short_B, low_B, middle_B), jnp.where(short_B, middle_B, high_B)

    high_B = jnp.max(order_BCL, axis=(1, 2))
    low_B = jnp.full_like(high_B, jnp.iinfo(high_B.dtype).min)
    _, last_B = fori_loop(0, jnp.iinfo(high_B.dtype).bits, halve, (low_B, high_B))

    # Of the tokens with that key as many are taken as the amount still needs.
    order_BV, last_B1 = _ordered(keys_BV), last_B[:, None]
    tied_BCL = jnp.where(order_BCL == last_B[:, None, None], weights_BCL, 0)
    end_B1 = _reach(tied_BCL, amount_B - beyond(last_B))[:, None]
    return (order_BV > last_B1) | ((order_BV == last_B1) & (jnp.arange(keys_BV.shape[-1]) <= end_B1))


def draw(logits_BV: Float[Array, "b v"], uniform_B: Float[Array, " b"]) -> Int[Array, " b"]:
    """Inverse-CDF sampling: the first token at which the cumulative mass reaches `(1 - u)` of the whole.

    `1 - u` is positive, so a token without mass is never drawn, however the sums round.
    """
    weights_BCL = _groups(_weights(logits_BV))
    # The whole is the last cumulative sum, and not a sum of its own: `_reach` compares with the same sums, so (1 - u)
    # of it is reached however they round.
    whole_B = _running(jnp.sum(weights_BCL, axis=-1))[:, -1]
    return _reach(weights_BCL, (1 - uniform_B.astype(whole_B.dtype)) * whole_B)


def _reach(weights_BCL: Array, amount_B: Array) -> Array:
    """The first token [B] at which the cumulative weight reaches the amount; else the last one that has weight."""
    # Two steps find the place: first the group whose cumulative sum reaches the amount, then the token within it. That
    # reads V + L numbers and never forms V cumulative sums.
    sums_BC = jnp.sum(weights_BCL, axis=-1)
    reached_BC = _running(sums_BC)
    group_B1 = _first_or_last(reached_BC >= amount_B[:, None], sums_BC > 0)[:, None]
    before_B1 = jnp.where(group_B1 > 0, jnp.take_along_axis(reached_BC, jnp.maximum(group_B1 - 1, 0), axis=1), 0)
    weights_BL = jnp.take_along_axis(weights_BCL, group_B1[..., None], axis=1)[:, 0]
    within_BL = before_B1 + _running(weights_BL)
    return group_B1[:, 0] * GROUP + _first_or_last(within_BL >= amount_B[:, None], weights_BL > 0)


def _running(x_BN: Array) -> Array:
    """Cumulative sums, as products with a triangle of ones: XLA makes a long program of `cumsum` on a CPU."""
    # Small rows: one product. Longer ones: cumulative sums within groups, and to each the sum of the groups before it,
    # found in the same way.
    n = x_BN.shape[-1]
    if n <= GROUP:
        return jnp.matmul(x_BN, jnp.triu(jnp.ones((n, n), x_BN.dtype)), precision="highest")
    within_BCL = jnp.matmul(_groups(x_BN), jnp.triu(jnp.ones((GROUP, GROUP), x_BN.dtype)), precision="highest")
    before_BC = pad(_running(within_BCL[..., -1])[:, :-1], ((0, 0), (1, 0)))
    return (within_BCL + before_BC[..., None]).reshape(x_BN.shape[0], -1)[:, :n]


def _first_or_last(reached: Array, some: Array) -> Array:
    """Index of the first that has something and reaches, else of the last that has something."""
    last_B = some.shape[-1] - 1 - jnp.argmax(some[:, ::-1], axis=-1)
    both = reached & some
    return jnp.where(jnp.any(both, axis=-1), jnp.argmax(both, axis=-1), last_B).astype(jnp.int32)


def _weights(logits_BV: Array) -> Array:
    """Probabilities times a number of each row: the likeliest token weighs 1."""
    return jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))


def _groups(x_BV: Array, fill: Any = 0) -> Array:
    """[B, C, L]."""
    short = -x_BV.shape[-1] % GROUP
    return pad(x_BV, ((0, 0), (0, short)), constant_values=fill).reshape(x_BV.shape[0], -1, GROUP)


def _total(x_BCL: Array) -> Array:
    """Sum of each row, over the groups first."""
    return jnp.sum(jnp.sum(x_BCL, axis=1), axis=-1)


def _bits(x: Array) -> Any:
    return jnp.int64 if x.dtype == jnp.float64 else jnp.int32


def _ordered(x: Array) -> Array:
    """Integers in the order of the floats, which must be float32 or float64; both zeros are one."""
    # The bits of positive floats, read as integers, have the order of the floats; those of negative ones have the
    # reverse order, which flipping all bits but the sign repairs. -0 and 0 are made one first.
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), _bits(x))
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _column(x_B: Array) -> Array:
    return x_B[:, None]


def _where_any(wanted_B: Array, apply: Callable[[Array], Array], logits_BV: Array) -> Array:
    """`apply` where a row wants it, at no cost where none does."""
    return cond(jnp.any(wanted_B), apply, lambda logits_BV: logits_BV, logits_BV)
