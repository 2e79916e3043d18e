"""Scaled dot-product attention: one function, several kernels.

A query sees a key when both belong to the same document (equal segment; 0 is padding) and the key does not lie after it
(position). A query that sees no key gets zero. `xla` is the readable reference; the others are tested against it,
forward and backward.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.numerics import wide

BLOCK = 128  # least query block of `blockwise`
MAX_BLOCKS = 16  # `blockwise` unrolls at most this many


class Places(NamedTuple):
    """Where tokens stand: position within the document, and the document (segment), 0 for padding."""

    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]


def attention(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    q_places: Places,
    k_places: Places,
    *,
    impl: str = "auto",
    aligned: bool = False,
) -> Float[Array, "b t n h"]:
    """Causal attention within documents (Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023).

    Args:
        q_places, k_places: positions and segments of queries [B, T] and keys [B, S].
        impl: `xla`, `blockwise`, `cudnn`, or `auto` for the hardware at hand.
        aligned: queries and keys are the same tokens in the same order (no cache), so no key at a later index is seen.
            `blockwise` and `cudnn` need this.

    Returns:
        The mixed values [B, T, N, H], in the dtype of `v`. Softmax runs in float32 or wider.
    """
    if impl == "auto":
        impl = default_impl(q_BTNH, aligned)
    if impl == "xla" or not aligned:
        return _xla(q_BTNH, k_BSKH, v_BSKH, q_places, k_places)
    if impl == "blockwise":
        return _blockwise(q_BTNH, k_BSKH, v_BSKH, q_places)
    if impl == "cudnn":
        return _cudnn(q_BTNH, k_BSKH, v_BSKH, q_places)
    raise ValueError(f"unknown attention implementation {impl!r}")


def cached_attention(
    q_BTNH: Float[Array, "b t n h"],
    keys_BKHS: Float[Array, "b k h s"],
    values_BKSH: Float[Array, "b k s h"],
    q_places: Places,
    k_places: Places,
) -> Float[Array, "b t n h"]:
    """`attention` over keys and values in the order in which a cache keeps them.

    Both products are plain matrix products of the cache as it lies, so a decoding step moves nothing but its query.
    """
    (b, t, n, h), (_, k, _, s) = q_BTNH.shape, keys_BKHS.shape
    q_BKRH = jnp.einsum("btkgh->bkgth", _grouped(q_BTNH, k)).reshape(b, k, -1, h)  # R = G T, all that read one kv head
    scores_BKRS = jnp.matmul(q_BKRH, keys_BKHS, preferred_element_type=wide(q_BTNH.dtype)) * h**-0.5
    mask_B11TS = visible(q_places, k_places)[:, None, None]
    probabilities = _softmax(jnp.where(mask_B11TS, scores_BKRS.reshape(b, k, -1, t, s), -jnp.inf))
    out_BKRH = jnp.matmul(probabilities.astype(values_BKSH.dtype).reshape(b, k, -1, s), values_BKSH)
    return jnp.einsum("bkgth->btkgh", out_BKRH.reshape(b, k, -1, t, h)).reshape(b, t, n, h)


def default_impl(q_BTNH: Float[Array, "b t n h"], aligned: bool) -> str:
    """The fastest implementation for the default backend, these shapes and this dtype."""
    if not aligned or q_BTNH.shape[1] < 2 * BLOCK:
        return "xla"
    t, head_dim = q_BTNH.shape[1], q_BTNH.shape[3]
    fits_cudnn = q_BTNH.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128 and t % 2 == 0
    if jax.default_backend() == "gpu" and fits_cudnn:
        return "cudnn"
    return "blockwise"


def visible(q: Places, k: Places) -> Bool[Array, "b t s"]:
    """Which keys each query sees."""
    same_document = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    return same_document & (q.positions[:, :, None] >= k.positions[:, None, :])


def _xla(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places) -> Array:
    q_BTKGH, width = _grouped(q_BTNH, k_BSKH.shape[2]), wide(q_BTNH.dtype)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=width)
    mask_BTS = visible(q_places, k_places)
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS * q_BTNH.shape[-1] ** -0.5, -jnp.inf)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", _softmax(scores_BKGTS).astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape).astype(v_BSKH.dtype)


def _softmax(scores_BKGTS: Array) -> Array:
    """Softmax over the keys, zero where nothing is seen."""
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _grouped(q_BTNH: Array, n_kv_heads: int) -> Array:
    b, t, n, h = q_BTNH.shape
    return q_BTNH.reshape(b, t, n_kv_heads, n // n_kv_heads, h)


# Blockwise: queries in blocks, each against the keys up to its own end. Skipping the later half of the square halves
# the work, and recomputing the probabilities in the backward pass keeps memory linear in T (Dao 2023, section 3).
# The G queries of one kv head and one token are neighbours, [B, K, T, G, H]: a block is then one matrix [T G, H].


@jax.custom_vjp
def _blockwise(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> Array:
    return _blockwise_forward(q_BTNH, k_BSKH, v_BSKH, places)[0]


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Rows of each block of queries, and of the keys that it may see."""
    size = max(BLOCK, -(-length // MAX_BLOCKS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    return [(slice(start, end), slice(0, end)) for start, end in zip(range(0, length, size), ends, strict=True)]


def _heads_first(x_BTNH: Array, n_kv_heads: int) -> Array:
    """[B, K, T, G, H]."""
    return jnp.swapaxes(_grouped(x_BTNH, n_kv_heads), 1, 2)


def _block_scores(q_BKTGH: Array, k_BKSH: Array, places: Places, rows: slice, keys: slice) -> Array:
    """Scaled, masked scores of one block [B, K, T, G, S] in float32 or wider."""
    mask_BTS = visible(
        Places(places.positions[:, rows], places.segments[:, rows]),
        Places(places.positions[:, keys], places.segments[:, keys]),
    )
    scores = jnp.einsum("bktgh,bksh->bktgs", q_BKTGH, k_BKSH, preferred_element_type=wide(k_BKSH.dtype))
    return jnp.where(mask_BTS[:, None, :, None], scores * q_BKTGH.shape[-1] ** -0.5, -jnp.inf)


def _blockwise_forward(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> tuple[Array, tuple]:
    n_kv_heads, width = k_BSKH.shape[2], wide(q_BTNH.dtype)
    q = _heads_first(q_BTNH, n_kv_heads)
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    outs, logs = [], []
    for rows, keys in _blocks(q_BTNH.shape[1]):
        scores = _block_scores(q[:, :, rows], k[:, :, keys], places, rows, keys)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bktgs,bksh->bktgh", weights.astype(v.dtype), v[:, :, keys], preferred_element_type=width)
        outs.append((mixed / jnp.where(total > 0, total, 1)).astype(v.dtype))
        logs.append(jnp.log(total) + top)
    out_BKTGH, log_BKTG1 = jnp.concatenate(outs, axis=2), jnp.concatenate(logs, axis=2)
    return jnp.swapaxes(out_BKTGH, 1, 2).reshape(q_BTNH.shape), (q, k, v, places, out_BKTGH, log_BKTG1)


def _blockwise_backward(residuals: tuple, dout_BTNH: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, places, out, log = residuals
    dtype, width, scale = q.dtype, wide(q.dtype), q.shape[-1] ** -0.5
    dout = _heads_first(dout_BTNH, k.shape[1])
    # sum_s p_ts dp_ts = out_t . dout_t: the softmax's own term of the score gradient
    inner = jnp.sum(dout.astype(width) * out.astype(width), axis=-1, keepdims=True)
    log = jnp.where(jnp.isfinite(log), log, 0)
    # The probabilities are made anew from what was kept, so XLA may make them early, and on a CPU it does: those of all
    # layers before the first is needed. Barriers are dropped there; a term of zero makes them wait for the gradient.
    q = q + 0 * dout
    dqs = []
    dk, dv = jnp.zeros(k.shape, width), jnp.zeros(v.shape, width)
    for rows, keys in _blocks(q.shape[2]):
        p = jnp.exp(_block_scores(q[:, :, rows], k[:, :, keys], places, rows, keys) - log[:, :, rows])
        dp = jnp.einsum("bktgh,bksh->bktgs", dout[:, :, rows], v[:, :, keys], preferred_element_type=width)
        ds = (p * (dp - inner[:, :, rows]) * scale).astype(dtype)
        dqs.append(jnp.einsum("bktgs,bksh->bktgh", ds, k[:, :, keys]))
        dk = dk.at[:, :, keys].add(jnp.einsum("bktgs,bktgh->bksh", ds, q[:, :, rows], preferred_element_type=width))
        p = p.astype(dtype)
        dv = dv.at[:, :, keys].add(jnp.einsum("bktgs,bktgh->bksh", p, dout[:, :, rows], preferred_element_type=width))
    dq_BTNH = jnp.swapaxes(jnp.concatenate(dqs, axis=2), 1, 2).reshape(dout_BTNH.shape)
    return dq_BTNH, jnp.swapaxes(dk, 1, 2).astype(dtype), jnp.swapaxes(dv, 1, 2).astype(dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _cudnn(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> Array:
    """cuDNN's fused kernel. Padding rows come out as zero, as everywhere."""
    mask_B1TS = visible(places, places)[:, None]
    out = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, implementation="cudnn")
    return jnp.where((places.segments != 0)[:, :, None, None], out, 0)
