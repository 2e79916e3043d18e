"""The next token of each row in JAX: penalties, bias, grammar, filters, the draw, and log-probabilities.

Shapes: R rows, V vocabulary, E end ids, Q likeliest others, W words of a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.infer.engine.request import MOST_LOGPROBS
from jaxlm.infer.engine.runner import Orders
from jaxlm.models.decoder import Cache
from jaxlm.ops import sampling as ops


class State(NamedTuple):
    """What the device keeps between calls."""

    cache: Cache
    seen_RV: Bool[Array, "r v"]
    """Tokens of the prompt, for rows with a penalty."""
    counts_RV: Int[Array, "r v"]
    """How often a token stands in the text so far."""
    bias_RV: Float[Array, "r v"]
    """Added to the logits, -inf for forbidden ids."""


def draw_rows(logits_RV: Array, state: State, orders: Orders, knobs: ops.Knobs, step: Array) -> tuple[Array, Array]:
    """The next token of each row, and the logits that the draw was from, those not kept at -inf."""
    seen_RV = lambda: state.seen_RV | (state.counts_RV > 0)  # noqa: E731
    logits_RV = ops.penalised_rows(logits_RV, seen_RV(), state.counts_RV, knobs)
    biased_R1 = (orders.biased != 0)[:, None]  # the others may still have the bias of a text before
    logits_RV = lax.cond(
        jnp.any(biased_R1), lambda x: jnp.where(biased_R1, x + state.bias_RV, x), lambda x: x, logits_RV
    )

    # Ends are forbidden until the text has its least length; then the grammar has its say.
    early_R1 = (orders.made + step < orders.least)[:, None]
    rows_R1 = jnp.arange(logits_RV.shape[0])[:, None]
    ends_RE = jnp.where(early_R1 & (orders.ends >= 0), orders.ends, logits_RV.shape[1])
    logits_RV = lax.cond(
        jnp.any(early_R1), lambda x: x.at[rows_R1, ends_RE].set(-jnp.inf, mode="drop"), lambda x: x, logits_RV
    )
    logits_RV = lax.cond(
        jnp.any(orders.ruled != 0),
        lambda x: jnp.where(_unpacked(orders, x.shape[1]), x, -jnp.inf),
        lambda x: x,
        logits_RV,
    )

    def sampled(logits_RV: Array) -> tuple[Array, Array]:
        kept_RV = ops.filtered_rows(logits_RV, knobs)
        return ops.draw(kept_RV, orders.uniforms[step]), kept_RV

    some = jnp.any((orders.active != 0) & ((knobs.temperature > 0) | (orders.processed != 0)))
    token_R, kept_RV = lax.cond(some, sampled, lambda x: (ops.greedy(x), x), logits_RV)
    forced_R = orders.forced[step]
    return jnp.where(forced_R >= 0, forced_R, token_R).astype(jnp.int32), kept_RV


def score_rows(logits_RV: Array, kept_RV: Array, token_R: Array, orders: Orders) -> tuple[Array, ...]:
    """Log-probabilities of the drawn tokens and the likeliest, raw or of the distribution drawn from."""

    def score(_: None) -> tuple[Array, ...]:
        return log_probs(jnp.where(orders.processed[:, None] != 0, kept_RV, logits_RV), token_R)

    def nothing(_: None) -> tuple[Array, ...]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(score, None))

    return lax.cond(jnp.any(orders.scored != 0), score, nothing, None)


def log_probs(logits_RV: Array, token_R: Array) -> tuple[Array, ...]:
    """Log-probability of each token, and the likeliest tokens with theirs."""
    total_R = jax.nn.logsumexp(logits_RV, axis=-1)
    own_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0] - total_R
    top_RQ, ids_RQ = lax.top_k(logits_RV, min(MOST_LOGPROBS, logits_RV.shape[-1]))
    return own_R, ids_RQ.astype(jnp.int32), top_RQ - total_R[:, None]


def _unpacked(orders: Orders, vocab: int) -> Array:
    """Which tokens the grammar of each row allows; all in rows without one."""
    bits_RW32 = (orders.mask[:, :, None] >> jnp.arange(32)) & 1
    allowed_RV = bits_RW32.reshape(bits_RW32.shape[0], -1)[:, :vocab] != 0
    return allowed_RV | (orders.ruled == 0)[:, None]
