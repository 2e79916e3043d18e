"""Normalisation over the last axis.

Statistics, scaling and shift are computed in float32 (float64 for float64 input); the result is rounded once, to the
input's dtype. Shapes: `...` any leading axes, D normalised width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.numerics import wide
from jaxlm.typed_jax import einsum


def rms_norm(x: Float[Array, "... d"], scale_D: Float[Array, " d"], *, eps: float) -> Float[Array, "... d"]:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, equation 4): `x / sqrt(mean(x^2) + eps) * scale`."""
    w = x.astype(wide(x.dtype))
    w = w * jax.lax.rsqrt(jnp.mean(w * w, axis=-1, keepdims=True) + eps)
    return (w * scale_D).astype(x.dtype)


def gated_rms_norm(
    x: Float[Array, "... d"],
    gate: Float[Array, "... d"],
    scale_D: Float[Array, " d"],
    *,
    eps: float,
    groups: int,
) -> Float[Array, "... d"]:
    """`rms_norm(x * silu(gate))` over each of `groups` equal parts of the last axis (Dao & Gu 2024, section 7.1)."""
    width = wide(x.dtype)
    # The gate is applied before the norm, as in the Mamba-2 paper; some code has it behind, which is another function.
    w = x.astype(width) * jax.nn.silu(gate.astype(width))
    parts = w.reshape(*w.shape[:-1], groups, -1)
    # A product of matrices, because XLA on a CPU does not vectorise a sum over the last axis.
    squares = einsum("...d,...d->...", parts, parts, precision="highest")[..., None]
    parts = parts * jax.lax.rsqrt(squares / parts.shape[-1] + eps)
    return (parts.reshape(w.shape) * scale_D).astype(x.dtype)


def layer_norm(
    x: Float[Array, "... d"], scale_D: Float[Array, " d"], bias_D: Float[Array, " d"], *, eps: float
) -> Float[Array, "... d"]:
    """Layer normalisation (Ba et al. 2016): `(x - mean) / sqrt(variance + eps) * scale + bias`, biased variance."""
    w = x.astype(wide(x.dtype))
    # Two passes: the mean is taken away before squares are summed. E[x^2] - E[x]^2 in one pass cancels when the mean is
    # large against the spread.
    w = w - jnp.mean(w, axis=-1, keepdims=True)
    w = w * jax.lax.rsqrt(jnp.mean(w * w, axis=-1, keepdims=True) + eps)
    return (w * scale_D + bias_D).astype(x.dtype)
