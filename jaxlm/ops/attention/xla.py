"""Attention as it is written: all scores at once. The readable reference of the other kernels.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.numerics import wide
from jaxlm.ops.attention.visible import (
    Form,
    Mixed,
    Places,
    capped,
    grouped_heads,
    masked_softmax,
    tokens_first,
    visible,
)
from jaxlm.typed_jax import einsum


def xla(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    q_places: Places,
    k_places: Places,
    form: Form,
) -> Mixed:
    """Causal attention within documents; the softmax runs in float32 or wider."""
    # The G queries that read one kv head stand together: one product for each kv head.
    q_BTKGH, width = grouped_heads(q_BTNH, k_BSKH.shape[2]), wide(q_BTNH.dtype)
    scores_BKGTS = einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=width)
    scores_BKGTS = capped(scores_BKGTS * q_BTNH.shape[-1] ** -0.5, form.softcap)

    # A query that sees nothing has only scores of -inf, which `masked_softmax` makes weights of zero.
    mask_BTS = visible(q_places, k_places, form.window)
    weights, lse = masked_softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf))
    out = einsum("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=form.dtype)
    return Mixed(out.reshape(q_BTNH.shape), tokens_first(lse))
