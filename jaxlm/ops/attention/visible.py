"""Which keys a query sees, and how parts of a softmax over different keys become one.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped


class Places(NamedTuple):
    """Where tokens stand: position within the document, and the document (segment), 0 for padding."""

    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]


class Keys(NamedTuple):
    """Keys and values with their places."""

    k: Float[Array, "b s k h"]
    v: Float[Array, "b s k h"]
    places: Places


class Mixed(NamedTuple):
    """What queries take from some of the keys they see, in float32 or wider."""

    out: Float[Array, "b t n h"]
    """Values weighted by the softmax over these keys alone; zero where none is seen."""
    lse: Float[Array, "b t n"]
    """Logarithm of the sum of the exponentials of the scores; -inf where none is seen."""


Sees = Literal["window", "before", "all"]


class Form(NamedTuple):
    """What a program of attention is made for."""

    window: int
    softcap: float
    dtype: Any
    """Of the output."""
    sees: Sees = "window"
    """Of blocks of queries: which keys, the last of which are of the queries' own tokens: none behind its own, and none
    before its window if the tokens of a document follow one another. `all`: they are any keys."""


def merge(
    parts: Sequence[Mixed], sink_logits_N: Float[Array, " n"] | None = None, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b t n h"]:
    """One softmax over the keys of all parts, which are disjoint: each part weighs the exponential of its log-sum-exp.

    Args:
        sink_logits_N: a score of each head that takes part in the softmax and has no value (gpt-oss).
        dtype: of the result.
    """
    lse_PBTN = jnp.stack([part.lse for part in parts])
    top_BTN = jnp.max(lse_PBTN, axis=0)
    if sink_logits_N is not None:
        sink_logits_N = sink_logits_N.astype(lse_PBTN.dtype)
        top_BTN = jnp.maximum(top_BTN, sink_logits_N)
    top_BTN = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_BTN), top_BTN, 0))
    weights_PBTN = jnp.exp(lse_PBTN - top_BTN)
    total_BTN = jnp.sum(weights_PBTN, axis=0)
    if sink_logits_N is not None:
        total_BTN = total_BTN + jnp.exp(sink_logits_N - top_BTN)
    weights_PBTN = weights_PBTN / jnp.where(total_BTN > 0, total_BTN, 1)
    out_BTNH: Any = sum(part.out * weight[..., None] for part, weight in zip(parts, weights_PBTN, strict=True))
    return out_BTNH.astype(dtype)


def visible(q: Places, k: Places, window: int = 0, beyond: int = 0) -> Bool[Array, "b t s"]:
    """Which keys each query sees: those fewer than `window` tokens back (0: all), and `beyond` or more."""
    same_document = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    seen = same_document & (q.positions[:, :, None] >= k.positions[:, None, :])
    if window or beyond:
        distance = q.positions[:, :, None] - k.positions[:, None, :]
        seen = seen & (distance < window) if window else seen
        seen = seen & (distance >= beyond) if beyond else seen
    return seen


def tokens_at(x_BS: Shaped[Array, "b s ..."], at_BT: Int[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Picks tokens by number, row by row: [B, ...] and what a token has."""

    def of_row(x_S: Array, at_T: Array) -> Array:
        return x_S[at_T]

    return jax.vmap(of_row)(x_BS, at_BT)


def one_after_other(first_BS: Array, second_BS: Array) -> Array:
    """The tokens of both [B, ...]."""
    return jnp.concatenate([first_BS, second_BS], axis=1)


def tokens_first(lse_BKGT: Array) -> Array:
    """[B, T, N]."""
    b, k, g, t = lse_BKGT.shape
    return jnp.moveaxis(lse_BKGT, 3, 1).reshape(b, t, k * g)


def grouped_heads(q_BTNH: Array, n_kv_heads: int) -> Array:
    b, t, n, h = q_BTNH.shape
    return q_BTNH.reshape(b, t, n_kv_heads, n // n_kv_heads, h)


def heads_first(x_BTNH: Array, n_kv_heads: int) -> Array:
    """[B, K, T, G, H]."""
    return jnp.swapaxes(grouped_heads(x_BTNH, n_kv_heads), 1, 2)


def masked_softmax(scores_BKGTS: Array) -> tuple[Array, Array]:
    """Softmax over the keys, zero where nothing is seen, and the log-sum-exp [B, K, G, T]."""
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, jnp.log(some) + top, -jnp.inf)
    return weights / some, lse[..., 0]


def capped(scores: Array, softcap: float) -> Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores
