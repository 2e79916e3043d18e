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
    probabilities, _ = _softmax(jnp.where(mask_B11TS, scores_BKRS.reshape(b, k, -1, t, s), -jnp.inf))
    out_BKRH = jnp.matmul(probabilities.astype(values_BKSH.dtype).reshape(b, k, -1, s), values_BKSH)
    return jnp.einsum("bkgth->btkgh", out_BKRH.reshape(b, k, -1, t, h)).reshape(b, t, n, h)


def default_impl(q_BTNH: Float[Array, "b t n h"], aligned: bool) -> str:
    """The fastest implementation for the default backend, these shapes and this dtype."""
    if not aligned or q_BTNH.shape[1] < 2 * BLOCK:
        return "xla"
    if jax.default_backend() == "gpu" and q_BTNH.dtype in (jnp.bfloat16, jnp.float16):
        return "cudnn"
    return "blockwise"


def visible(q: Places, k: Places) -> Bool[Array, "b t s"]:
    """Which keys each query sees."""
    same_document = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    return same_document & (q.positions[:, :, None] >= k.positions[:, None, :])


def _xla(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places) -> Array:
    q_BTKGH = _grouped(q_BTNH, k_BSKH.shape[2])
    out_BTKGH, _ = _softmax_mix(q_BTKGH, k_BSKH, v_BSKH, visible(q_places, k_places))
    return out_BTKGH.reshape(q_BTNH.shape).astype(v_BSKH.dtype)


def _grouped(q_BTNH: Array, n_kv_heads: int) -> Array:
    b, t, n, h = q_BTNH.shape
    return q_BTNH.reshape(b, t, n_kv_heads, n // n_kv_heads, h)


def _scores(q_BTKGH: Array, k_BSKH: Array, mask_BTS: Array) -> Array:
    """Scaled, masked scores [B, K, G, T, S] in float32 or wider."""
    width = wide(q_BTKGH.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=width)
    return jnp.where(mask_BTS[:, None, None], scores * q_BTKGH.shape[-1] ** -0.5, -jnp.inf)


def _softmax_mix(q_BTKGH: Array, k_BSKH: Array, v_BSKH: Array, mask_BTS: Array) -> tuple[Array, Array]:
    """Attention of one block of queries, and their log-partition [B, K, G, T]; -inf where nothing is seen."""
    probabilities, log_BKGT = _softmax(_scores(q_BTKGH, k_BSKH, mask_BTS))
    return jnp.einsum("bkgts,bskh->btkgh", probabilities.astype(v_BSKH.dtype), v_BSKH), log_BKGT


def _softmax(scores_BKGTS: Array) -> tuple[Array, Array]:
    """Softmax over the keys, zero where nothing is seen, and the log-partition."""
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1), (jnp.log(total) + top)[..., 0]


# Blockwise: queries in blocks, each against the keys up to its own end. Skipping the later half of the square halves
# the work, and recomputing the probabilities in the backward pass keeps memory linear in T (Dao 2023, section 3).


@jax.custom_vjp
def _blockwise(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> Array:
    return _blockwise_forward(q_BTNH, k_BSKH, v_BSKH, places)[0]


def _blocks(length: int) -> list[slice]:
    size = max(BLOCK, -(-length // MAX_BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _block_mask(places: Places, rows: slice) -> Array:
    keys = slice(0, rows.stop)
    return visible(
        Places(places.positions[:, rows], places.segments[:, rows]),
        Places(places.positions[:, keys], places.segments[:, keys]),
    )


def _blockwise_forward(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> tuple[Array, tuple]:
    q_BTKGH = _grouped(q_BTNH, k_BSKH.shape[2])
    outs, logs = [], []
    for rows in _blocks(q_BTNH.shape[1]):
        keys = slice(0, rows.stop)
        out, log = _softmax_mix(q_BTKGH[:, rows], k_BSKH[:, keys], v_BSKH[:, keys], _block_mask(places, rows))
        outs.append(out)
        logs.append(log)
    out_BTKGH = jnp.concatenate(outs, axis=1)
    out_BTNH = out_BTKGH.reshape(q_BTNH.shape).astype(v_BSKH.dtype)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, places, out_BTNH, jnp.concatenate(logs, axis=-1))


def _blockwise_backward(residuals: tuple, dout_BTNH: Array) -> tuple[Array, Array, Array, None]:
    q_BTNH, k_BSKH, v_BSKH, places, out_BTNH, log_BKGT = residuals
    dtype, width, n_kv_heads = q_BTNH.dtype, wide(q_BTNH.dtype), k_BSKH.shape[2]
    q, dout = _grouped(q_BTNH, n_kv_heads), _grouped(dout_BTNH, n_kv_heads)
    # sum_s p_ts dp_ts = out_t . dout_t: the softmax's own term of the score gradient
    inner_BKGT = jnp.einsum("btkgh,btkgh->bkgt", dout.astype(width), _grouped(out_BTNH, n_kv_heads).astype(width))
    scale = q_BTNH.shape[-1] ** -0.5
    dqs = []
    dk, dv = jnp.zeros(k_BSKH.shape, width), jnp.zeros(v_BSKH.shape, width)
    for rows in _blocks(q_BTNH.shape[1]):
        keys = slice(0, rows.stop)
        log = log_BKGT[..., rows, None]
        scores = _scores(q[:, rows], k_BSKH[:, keys], _block_mask(places, rows))
        p = jnp.exp(scores - jnp.where(jnp.isfinite(log), log, 0))
        dp = jnp.einsum("btkgh,bskh->bkgts", dout[:, rows], v_BSKH[:, keys], preferred_element_type=width)
        ds = (p * (dp - inner_BKGT[..., rows, None]) * scale).astype(dtype)
        dqs.append(jnp.einsum("bkgts,bskh->btkgh", ds, k_BSKH[:, keys]))
        dk = dk.at[:, keys].add(jnp.einsum("bkgts,btkgh->bskh", ds, q[:, rows], preferred_element_type=width))
        dv = dv.at[:, keys].add(
            jnp.einsum("bkgts,btkgh->bskh", p.astype(dtype), dout[:, rows], preferred_element_type=width)
        )
    return jnp.concatenate(dqs, axis=1).reshape(q_BTNH.shape), dk.astype(dtype), dv.astype(dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _cudnn(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, places: Places) -> Array:
    """cuDNN's fused kernel. Padding rows come out as zero, as everywhere."""
    mask_B1TS = visible(places, places)[:, None]
    out = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=True, implementation="cudnn")
    return jnp.where((places.segments != 0)[:, :, None, None], out, 0)
