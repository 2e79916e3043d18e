"""Attention by JAX's Pallas kernel for TPUs, "splash": blocks of scores stay on the chip, in both directions.

The kernel knows a mask by index and segments. Where rows are aligned (`ops.attention`) this is the mask by position:
the tokens of a document follow one another, so within it positions and indices differ by a constant, and causality and
distance are the same in both. Padding, segment 0, sees itself there and is set to zero here.

A Pallas call is not split by XLA, so on a mesh it runs inside `shard_map`: rows over the batch axes, heads over theirs,
and queries over the axis of the sequence against all keys, which the partitioner gathers.

Shapes: B batch, T length, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as pallas
from jaxtyping import Array, Float, Int

from jaxlm.ops.site import Site, here
from jaxlm.typed_jax import pad

LANES = 128  # rows are padded to a multiple of this, the width of a vector register
BLOCKS = (512, 256, 128)  # of queries and of keys: the first that divides the row


def splash(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    segments_BT: Int[Array, "b t"],
    *,
    window: int = 0,
    softcap: float = 0.0,
    sink_logits_N: Float[Array, " n"] | None = None,
    site: Site | None = None,
) -> Float[Array, "b t n h"]:
    """`ops.attention` of aligned rows, in bfloat16 or float32; on a CPU the kernel is interpreted, which is slow.

    Queries are scaled before the product, in their own dtype.

    Args:
        segments_BT: the document of each token, 0 for padding.
        window, softcap: as in `ops.attention`.
        sink_logits_N: as in `ops.attention.visible.merge`.
    """
    site = site or here()
    layout = site.layout
    _, t, n, h = q_BTNH.shape
    shards, head_shards = (1, 1) if layout is None else (layout.parts("seq"), layout.parts("heads"))
    short = -t % (LANES * shards)
    # each device has the kv heads of its heads: one that serves heads on several is there more than once
    times = math.lcm(k_BTKH.shape[2], head_shards) // k_BTKH.shape[2]
    k, v = (jnp.repeat(x, times, axis=2) if times > 1 else x for x in (k_BTKH, v_BTKH))
    q, k, v = (pad(x, [(0, 0), (0, short), (0, 0), (0, 0)]) for x in (q_BTNH * h**-0.5, k, v))
    q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    padded_BT = pad(segments_BT, [(0, 0), (0, short)])
    kernel = _kernel(n, t + short, head_shards, shards, window, softcap, site.platform == "cpu")

    def mixed(kernel: Any, q: Array, k: Array, v: Array, mine: Array, theirs: Array, sinks: Array | None) -> Array:
        def row(q: Array, k: Array, v: Array, mine: Array, theirs: Array) -> Array:
            return kernel(q, k, v, pallas.SegmentIds(mine, theirs), sinks)

        return jax.vmap(row)(q, k, v, mine, theirs)

    if layout is not None:
        queries, keys = layout.spec(("batch", "heads", "seq", None)), layout.spec(("batch", "heads", None, None))
        tables = kernel.manual_sharding_spec(layout.sharding(("heads", "seq")))
        tokens = layout.spec(("batch", "seq")), layout.spec(("batch", None))
        mixed = jax.shard_map(
            mixed,
            mesh=layout.mesh,
            in_specs=(tables, queries, keys, keys, *tokens, layout.spec(("heads",))),
            out_specs=queries,
            check_vma=False,  # the kernel does not say over which axes its results vary
        )
    out_BNTH = mixed(kernel, q_BNTH, k_BKTH, v_BKTH, padded_BT, padded_BT, sink_logits_N)
    out_BTNH = jnp.swapaxes(out_BNTH, 1, 2)[:, :t]
    return jnp.where((segments_BT != 0)[:, :, None, None], out_BTNH, 0)


def _kernel(
    n_heads: int, length: int, head_shards: int, shards: int, window: int, softcap: float, interpret: bool
) -> Any:
    """The kernel for all heads of a row, with the tables that tell it which blocks to visit."""
    square = (length, length)
    mask = pallas.LocalMask(square, (window - 1, 0), 0) if window else pallas.CausalMask(square)
    q_block = next(size for size in BLOCKS if length // shards % size == 0)
    block = next(size for size in BLOCKS if length % size == 0)
    sizes = pallas.BlockSizes(
        block_q=q_block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=q_block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=q_block,
        block_kv_dq=block,
    )
    return pallas.make_splash_mha(
        pallas.MultiHeadMask([mask] * n_heads),
        block_sizes=sizes,
        head_shards=head_shards,
        q_seq_shards=shards,
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )
