"""cuDNN's fused attention.

Shapes: B batch, T query length, S key length, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.ops.attention.visible import Places, visible


def cudnn(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    q_places: Places,
    k_places: Places,
    window: int,
    aligned: bool,
) -> Float[Array, "b t n h"]:
    """cuDNN's fused kernel. Padding rows come out as zero, as everywhere."""
    mask_B1TS = visible(q_places, k_places, window)[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask_B1TS, is_causal=aligned, implementation="cudnn"
    )
    return jnp.where((q_places.segments != 0)[:, :, None, None], out_BTNH, 0)
