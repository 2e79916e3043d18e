"""Attention in blocks of queries: memory linear in the tokens, with a gradient of its own.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxlm.numerics import wide
from jaxlm.ops.attention.visible import (
    Form,
    Mixed,
    Places,
    capped,
    heads_first,
    visible,
)
from jaxlm.typed_jax import custom_vjp, einsum, pad

BLOCK = 128  # least query block of `blockwise`
MAX_BLOCKS = 16  # `blockwise` unrolls at most this many


def folded(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places, form: Form) -> Mixed:
    """`_blockwise`; with a window, rows that need too many blocks are cut into pieces, rows of their own.

    A piece has the keys of its tokens and, before them, those of the window - 1 tokens that its first one sees. Keys
    are those of the tokens, and with a window perhaps of as many before them.
    """
    b, t, halo, given = *q_BTNH.shape[:2], form.window - 1, k_BSKH.shape[1] - q_BTNH.shape[1]
    pieces = -(-t // (_block_size(t, form.window) * MAX_BLOCKS)) if form.window else 1
    if pieces == 1:
        return _blockwise(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form)
    length = -(-t // pieces)

    def cut(x: Array, before: int = halo, given: int = given) -> Array:
        x = pad(x, [(0, 0), (before - given, pieces * length - t), *[(0, 0)] * (x.ndim - 2)])
        parts = [x[:, i * length : (i + 1) * length + before] for i in range(pieces)]
        return jnp.stack(parts, axis=1).reshape(b * pieces, length + before, *x.shape[2:])

    q_places, k_places = Places(*(cut(x, 0, 0) for x in q_places)), Places(*(cut(x) for x in k_places))
    mixed = _blockwise(cut(q_BTNH, 0, 0), cut(k_BSKH), cut(v_BSKH), q_places, k_places, form)
    return Mixed(*(x.reshape(b, pieces * length, *x.shape[2:])[:, :t] for x in mixed))


class Kept(NamedTuple):
    """What the backward pass needs, heads first."""

    q: Float[Array, "b k t g h"]
    k: Float[Array, "b k s h"]
    v: Float[Array, "b k s h"]
    q_places: Places
    k_places: Places
    out: Float[Array, "b k t g h"]
    log: Float[Array, "b k t g 1"]
    """The log-sum-exp of the scores of each query."""


@custom_vjp(5)
def _blockwise(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places, form: Form) -> Mixed:
    return blockwise_forward(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form)[0]


def _block_size(length: int, window: int) -> int:
    least = -(-length // MAX_BLOCKS)
    return max(BLOCK, min(window // 4, least) if window else least)


def _blocks(length: int, keys: int, form: Form) -> list[tuple[slice, slice]]:
    """Rows of each block of queries, and of the keys that it may see."""
    size, before = _block_size(length, form.window), keys - length
    rows = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    ends = [keys if form.sees == "all" else before + row.stop for row in rows]
    banded = form.window and form.sees == "window"
    begins = [max(0, before + row.start - form.window + 1) if banded else 0 for row in rows]
    return [(row, slice(begin, end)) for row, begin, end in zip(rows, begins, ends, strict=True)]


def _block_scores(
    q_BKTGH: Array, k_BKSH: Array, q_places: Places, k_places: Places, rows: slice, keys: slice, form: Form
) -> tuple[Array, Array]:
    """Scaled, capped scores of one block [B, K, T, G, S] in float32 or wider, and the same with what is unseen -inf."""
    mask_BTS = visible(
        Places(q_places.positions[:, rows], q_places.segments[:, rows]),
        Places(k_places.positions[:, keys], k_places.segments[:, keys]),
        form.window,
    )
    scores = einsum("bktgh,bksh->bktgs", q_BKTGH, k_BKSH, preferred_element_type=wide(k_BKSH.dtype))
    scores = capped(scores * q_BKTGH.shape[-1] ** -0.5, form.softcap)
    return scores, jnp.where(mask_BTS[:, None, :, None], scores, -jnp.inf)


def blockwise_forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places, form: Form
) -> tuple[Mixed, Kept]:
    n_kv_heads, width = k_BSKH.shape[2], wide(q_BTNH.dtype)
    q = heads_first(q_BTNH, n_kv_heads)
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    outs: list[Array] = []
    logs: list[Array] = []
    for rows, keys in _blocks(q.shape[2], k.shape[2], form):
        _, scores = _block_scores(q[:, :, rows], k[:, :, keys], q_places, k_places, rows, keys, form)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = einsum("bktgs,bksh->bktgh", weights.astype(v.dtype), v[:, :, keys], preferred_element_type=width)
        outs.append((mixed / jnp.where(total > 0, total, 1)).astype(form.dtype))
        logs.append(jnp.log(total) + top)
    out_BKTGH, log_BKTG1 = jnp.concatenate(outs, axis=2), jnp.concatenate(logs, axis=2)
    out_BTNH = jnp.swapaxes(out_BKTGH, 1, 2).reshape(q_BTNH.shape)
    lse_BTN = jnp.swapaxes(log_BKTG1, 1, 2).reshape(q_BTNH.shape[:3])
    return Mixed(out_BTNH, lse_BTN), Kept(q, k, v, q_places, k_places, out_BKTGH, log_BKTG1)


def _blockwise_backward(form: Form, kept: Kept, cotangents: Mixed) -> tuple[Array, Array, Array, None, None]:
    dtype = kept.q.dtype
    dq_BTNH, dk_BSKH, dv_BSKH = (x.astype(dtype) for x in blockwise_gradients(kept, cotangents, form, dtype))
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None


def blockwise_gradients(kept: Kept, cotangents: Mixed, form: Form, dq_dtype: DTypeLike) -> tuple[Array, Array, Array]:
    """Of queries, keys and values: their share of the whole, if output and log-sum-exp are those of more keys.

    Args:
        kept: of `blockwise_forward`.
        dq_dtype: what the gradient of the queries is made in; those of keys and values are float32 or wider.
    """
    q, k, v, q_places, k_places, out, log = kept
    dout_BTNH, dlse_BTN = cotangents
    dtype, width, scale = q.dtype, wide(q.dtype), q.shape[-1] ** -0.5
    dout = heads_first(dout_BTNH, k.shape[1])
    # sum_s p_ts dp_ts = out_t . dout_t: the softmax's own term of the score gradient
    inner = jnp.sum(dout.astype(width) * out.astype(width), axis=-1, keepdims=True)
    inner = inner - heads_first(dlse_BTN[..., None], k.shape[1])
    dout = dout.astype(dtype)
    log = jnp.where(jnp.isfinite(log), log, 0)
    # The probabilities are made anew from what was kept, so XLA may make them early, and on a CPU it does: those of all
    # layers before the first is needed. Barriers are dropped there; a term of zero makes them wait for the gradient.
    q = q + 0 * dout
    dqs: list[Array] = []
    dk, dv = jnp.zeros(k.shape, width), jnp.zeros(v.shape, width)
    for rows, keys in _blocks(q.shape[2], k.shape[2], form):
        scores, seen = _block_scores(q[:, :, rows], k[:, :, keys], q_places, k_places, rows, keys, form)
        p = jnp.exp(seen - log[:, :, rows])
        dp = einsum("bktgh,bksh->bktgs", dout[:, :, rows], v[:, :, keys], preferred_element_type=width)
        ds = p * (dp - inner[:, :, rows]) * scale
        ds = (ds * (1 - (scores / form.softcap) ** 2) if form.softcap else ds).astype(dtype)
        dqs.append(einsum("bktgs,bksh->bktgh", ds, k[:, :, keys], preferred_element_type=dq_dtype))
        dk = dk.at[:, :, keys].add(einsum("bktgs,bktgh->bksh", ds, q[:, :, rows], preferred_element_type=width))
        p = p.astype(dtype)
        dv = dv.at[:, :, keys].add(einsum("bktgs,bktgh->bksh", p, dout[:, :, rows], preferred_element_type=width))
    dq_BTNH = jnp.swapaxes(jnp.concatenate(dqs, axis=2), 1, 2).reshape(dout_BTNH.shape)
    return dq_BTNH, jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)


_blockwise.defvjp(blockwise_forward, _blockwise_backward)
