"""A teacher's distributions, whole or as its likeliest tokens, and the divergence of a student from them.

Shapes: B batch, T length, E width of the teacher, V vocabulary, K likeliest tokens, C tokens of a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.objectives.blocks import block_count, join, split
from jaxlm.typed_jax import einsum, put_along_axis


class Teacher(NamedTuple):
    """A teacher in memory: its hidden states and its output matrix."""

    hidden_BTE: Float[Array, "b t e"]
    kernel_EV: Float[Array, "e v"]
    bias_V: Float[Array, " v"] | None = None


class LikeliestTokens(NamedTuple):
    """What is kept of a teacher: its K likeliest tokens, and all others as one."""

    logps_BTK: Float[Array, "b t k"]
    """Log-probabilities at the temperature of the loss, largest first."""
    ids_BTK: Int[Array, "b t k"]
    rest_BT: Float[Array, "b t"]
    """Log-probability of all other tokens together; of no account where K = V."""


def divergence(logp_BTV: Float[Array, "b t v"], teacher_BTV: Float[Array, "b t v"], beta: float) -> Float[Array, "b t"]:
    """D of two distributions by their log-probabilities, as `distill_loss` has it."""
    if beta == 0:
        return _kl(teacher_BTV, logp_BTV)
    if beta == 1:
        return _kl(logp_BTV, teacher_BTV)
    mixture_BTV = jnp.logaddexp(math.log(beta) + teacher_BTV, math.log1p(-beta) + logp_BTV)
    return beta * _kl(teacher_BTV, mixture_BTV) + (1 - beta) * _kl(logp_BTV, mixture_BTV)


def likeliest_tokens(teacher: Teacher, k: int, *, temperature: float = 1.0, block: int = 1024) -> LikeliestTokens:
    """The `k` likeliest tokens of a teacher at each place, and the log-probability of all others together."""

    def body(_: None, hidden_BCE: Array) -> tuple[None, LikeliestTokens]:
        logp_BCV = jax.nn.log_softmax(wide_logits(hidden_BCE, teacher.kernel_EV, teacher.bias_V) / temperature)
        logps_BCK, ids_BCK = jax.lax.top_k(logp_BCV, k)
        return None, LikeliestTokens(logps_BCK, ids_BCK, _log_rest(logp_BCV, ids_BCK))

    blocks = block_count(teacher.hidden_BTE.shape, block)
    return join(jax.lax.scan(body, None, split(teacher.hidden_BTE, blocks))[1])


def outcomes(logp_BCV: Array, teacher_BCK: Array, ids_BCK: Array, rest_BC: Array) -> tuple[Array, Array]:
    """Student and teacher over K + 1 outcomes; over the whole vocabulary where no token is left for the last."""
    kept_BCK = jnp.take_along_axis(logp_BCV, ids_BCK, axis=-1)
    if ids_BCK.shape[-1] == logp_BCV.shape[-1]:
        return kept_BCK, teacher_BCK
    rests = _log_rest(logp_BCV, ids_BCK), rest_BC
    student_BCJ, teacher_BCJ = (
        jnp.concatenate([kept, rest[..., None]], axis=-1)
        for kept, rest in zip((kept_BCK, teacher_BCK), rests, strict=True)
    )
    return student_BCJ, teacher_BCJ


def wide_logits(hidden_BCD: Array, kernel_DV: Array, bias_V: Array | None) -> Array:
    """Logits in float32 or wider."""
    logits_BCV = einsum("bcd,dv->bcv", hidden_BCD, kernel_DV, preferred_element_type=wide(hidden_BCD.dtype))
    return logits_BCV if bias_V is None else logits_BCV + bias_V


def _log_rest(logp_BCV: Array, ids_BCK: Array) -> Array:
    """Log-probability of all tokens but these: a sum, not a difference, so that a small rest keeps its digits."""
    kept_BCV = put_along_axis(jnp.zeros(logp_BCV.shape, bool), ids_BCK, True, axis=-1)
    return jax.nn.logsumexp(jnp.where(kept_BCV, -jnp.inf, logp_BCV), axis=-1)


def _kl(a_BCV: Array, b_BCV: Array) -> Array:
    return jnp.sum(jnp.exp(a_BCV) * (a_BCV - b_BCV), axis=-1)
