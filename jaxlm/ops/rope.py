"""Positions: rotary (Su et al. 2021) and sinusoidal (Vaswani et al. 2017).

Shapes: B batch, T length, N heads, H head dim, P rotated pairs of a head (H/2, or fewer), D width.
Frequencies are float64 constants made on the host, so both frameworks start from the same bits.
"""

from __future__ import annotations

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.config.model import Rope
from jaxlm.config.model_parts import RopeScaling
from jaxlm.numerics import wide

UNSCALED = RopeScaling()


def rope_frequencies(dim: int, theta: float, scaling: RopeScaling = UNSCALED) -> np.ndarray:
    """Angular frequency of each pair, `theta^(-2i/dim)`, radians per token, float64 [P] (section 3.2.2), scaled.

    With factor s and trained length L: `linear` is f / s (Chen et al. 2023, section 2.3); `ntk` takes the base
    `theta s^(dim / (dim - 2))`, so that the slowest pair slows down by s and the fastest not at all; `llama3` and
    `yarn` go from f / s to f, the first linearly in the number of turns L f / 2 pi (Llama 3.1's reference code), the
    second linearly in i between the pairs that make `beta_fast` and `beta_slow` turns (Peng et al. 2023, section 3.2).

    Args:
        dim: rotated elements of a head, 2 P.
        scaling: its factor is resolved, not 0.
    """
    if scaling.kind == "ntk":
        theta *= scaling.factor ** (dim / max(dim - 2, 1))
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        # `kept` is the share of the frequency that stays. Pairs that turn often within the trained length encode near
        # distances and stay; pairs that do not complete a turn have seen only part of the circle and are slowed down.
        turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
    elif scaling.kind == "yarn":
        first, last = (_pair_with(beta, dim, theta, scaling) for beta in (scaling.beta_fast, scaling.beta_slow))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The 1e-3 stands for a ramp of no width, as in the reference code: without it a model whose two ends fall on
        # one pair divides by zero.
        first, last = max(first, 0), min(last, dim - 1)
        kept = 1 - np.clip((np.arange(dim // 2) - first) / ((last - first) or 1e-3), 0, 1)
    else:
        return frequencies
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rope_temperature(scaling: RopeScaling) -> float:
    """What YaRN multiplies sine and cosine by, so that logits grow by its square (Peng et al. 2023, equation 22)."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def _pair_with(turns: float, dim: int, theta: float, scaling: RopeScaling) -> float:
    """The index i, not rounded, of the pair that makes so many turns within the trained length."""
    return dim * math.log(scaling.original_max_seq_len / (2 * math.pi * turns)) / (2 * math.log(theta))


def rope_table(
    positions_BT: Int[Array, "b t"],
    frequencies_P: np.ndarray,
    dtype: DTypeLike = jnp.float32,
    temperature: float = 1.0,
) -> tuple[Float[Array, "b t p"], Float[Array, "b t p"]]:
    """Sine and cosine of every angle `position * frequency`, times the temperature, in `wide(dtype)`."""
    width = wide(dtype)
    # Positions times frequencies in float32 or wider: in bfloat16 positions above 256 are no longer distinct.
    angles_BTP = positions_BT[..., None].astype(width) * jnp.asarray(frequencies_P, width)
    sin_BTP, cos_BTP = jnp.sin(angles_BTP), jnp.cos(angles_BTP)
    return (sin_BTP, cos_BTP) if temperature == 1 else (sin_BTP * temperature, cos_BTP * temperature)


def rope_table_of(
    positions_BT: Int[Array, "b t"], rope: Rope, dtype: DTypeLike
) -> tuple[Float[Array, "b t p"], Float[Array, "b t p"]]:
    """The table of a rotation of the config."""
    dim, theta, scaling = rope
    return rope_table(positions_BT, rope_frequencies(dim, theta, scaling), dtype, rope_temperature(scaling))


def apply_rope(
    x_BTNH: Float[Array, "b t n h"],
    sin_BTP: Float[Array, "b t p"],
    cos_BTP: Float[Array, "b t p"],
    *,
    layout: Literal["half", "interleaved"],
) -> Float[Array, "b t n h"]:
    """Rotate each pair of each head by its angle (equation 34): `(a, b) -> (a cos - b sin, b cos + a sin)`.

    `half` pairs element i with i + P, `interleaved` pairs 2i with 2i + 1. Computed wide, rounded once. Elements from 2P
    on pass through.
    """
    rotated_dim = 2 * sin_BTP.shape[-1]
    if rotated_dim < x_BTNH.shape[-1]:
        first, rest = jnp.split(x_BTNH, [rotated_dim], axis=-1)
        return jnp.concatenate([apply_rope(first, sin_BTP, cos_BTP, layout=layout), rest], axis=-1)
    # The table is shared by all heads, hence the axis of size 1. `half` keeps both halves contiguous; `interleaved` is
    # what GPT-J and the Meta checkpoints have, and reads with a stride of two.
    sin, cos = sin_BTP[:, :, None, :], cos_BTP[:, :, None, :]
    x = x_BTNH.astype(sin.dtype)
    if layout == "half":
        a, b = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return rotated.astype(x_BTNH.dtype)


def sinusoidal_table(max_len: int, d_model: int) -> np.ndarray:
    """Fixed positions, float64 [max_len, D] (section 3.5): even columns are sines, odd columns cosines."""
    angles = np.arange(max_len)[:, None] * 10000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(max_len, -1)[:, :d_model]
