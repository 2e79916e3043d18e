"""From logits to the next token. Options combine in this order, which is that of transformers:

repetition penalty, temperature, top-k, top-p, min-p, draw.

The randomness of a draw is one given uniform number a row, so the same numbers draw the same tokens in both frameworks.

Shapes: B rows, V vocabulary, C candidates: the tokens that are left, C <= V.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def sample(
    logits_BV: Float[Array, "b v"],
    uniform_B: Float[Array, " b"] | None = None,
    seen_BV: Bool[Array, "b v"] | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Int[Array, " b"]:
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
    return choice_B if ids_BC is None else jnp.take_along_axis(ids_BC, choice_B[:, None], axis=-1)[:, 0]


def greedy(logits_BV: Float[Array, "b v"]) -> Int[Array, " b"]:
    """The token with the largest logit; of equal ones the lowest."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


def penalise_repetition(
    logits_BV: Float[Array, "b v"], seen_BV: Bool[Array, "b v"], penalty: float
) -> Float[Array, "b v"]:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones (Keskar et al. 2019, 4.1)."""
    punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, punished_BV, logits_BV)


def largest(logits_BV: Float[Array, "b v"], k: int) -> tuple[Float[Array, "b c"], Int[Array, "b c"]]:
    """The k largest logits (Fan et al. 2018) and their tokens, falling; of equal ones the lower token comes first."""
    logits_BC, ids_BC = lax.top_k(logits_BV, k)
    return logits_BC, ids_BC


def keep_top_p(falling_BC: Float[Array, "b c"], p: float) -> Float[Array, "b c"]:
    """Keep the fewest largest tokens whose mass reaches p (Holtzman et al. 2020), the one that crosses it included.

    Takes falling logits; what is dropped becomes -inf. The first is always kept.
    """
    probabilities = _softmax(falling_BC)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass of the larger ones
    keep = (before < p).at[:, 0].set(True)
    return jnp.where(keep, falling_BC, -jnp.inf)


def keep_min_p(logits_BC: Float[Array, "b c"], p: float) -> Float[Array, "b c"]:
    """Keep the tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    top_B1 = jnp.max(logits_BC, axis=-1, keepdims=True)
    return jnp.where(jnp.exp(logits_BC - top_B1) >= p, logits_BC, -jnp.inf)


def draw(logits_BC: Float[Array, "b c"], uniform_B: Float[Array, " b"]) -> Int[Array, " b"]:
    """Inverse-CDF sampling: the first candidate at which the cumulative mass reaches `(1 - u)` of the whole.

    `1 - u` is positive, so a candidate without mass is never drawn, however the sums round.
    """
    mass_BC = _softmax(logits_BC)
    reached_BC = jnp.where(mass_BC > 0, jnp.cumsum(mass_BC, axis=-1), 0)
    threshold_B1 = (1 - uniform_B.astype(mass_BC.dtype))[:, None] * jnp.max(reached_BC, axis=-1, keepdims=True)
    return jnp.argmax(reached_BC >= threshold_B1, axis=-1).astype(jnp.int32)


def _softmax(logits_BC: Array) -> Array:
    weights = jnp.exp(logits_BC - jnp.max(logits_BC, axis=-1, keepdims=True))
    return weights / jnp.sum(weights, axis=-1, keepdims=True)
