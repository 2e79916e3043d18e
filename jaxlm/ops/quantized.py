"""Four-bit NormalFloat weights: QLoRA's storage of frozen kernels (Dettmers et al. 2023, sections 3 and appendix E).

A weight [..., I] is cut into blocks of 64 along its last axis. A block keeps its largest magnitude, its scale, and for
each value the nearest of 16 levels, quantiles of a normal distribution between -1 and 1; two codes share a byte, the
first in the high bits. With double quantisation, blocks of 256 scales less their mean are stored in 8 bits of a
logarithmic code (Dettmers et al. 2022, "8-bit optimizers", section 1.3). Codes, scales and values are those of
bitsandbytes, bit for bit; values are float32 by definition, whatever the compute dtype.

Shapes: I inputs of a weight, G = I / 64 blocks of a row, Q scales of a whole weight, C = Q / 256 blocks of scales.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from jaxlm.typed_jax import pad

BLOCK = 64
"""Values that share a scale."""
SCALE_BLOCK = 256
"""Scales that share a scale of their own."""
_PLACES = (2**16 - 1) / 2

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""NF4: of each half of the normal distribution equally likely quantiles, scaled to 1 (Dettmers et al. 2023, eq. 4)."""


class NF4(NamedTuple):
    """A weight in four bits a value."""

    codes: UInt8[Array, "... half"]
    """Two values a byte [..., I / 2]."""
    scales: Float32[Array, "... g"]
    """[..., I / 64]."""


class Scales8(NamedTuple):
    """Scales in eight bits each: double quantisation."""

    codes: UInt8[Array, "... g"]
    scales: Float32[Array, " c"]
    offset: Float32[Array, ""]
    """Their mean."""


def quantize(weight: Float[Array, "... i"]) -> NF4:
    """A weight whose last axis is a multiple of 64 as NF4; it is rounded to float32 first."""
    blocks = weight.astype(jnp.float32).reshape(*weight.shape[:-1], -1, BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    scaled = jnp.clip(blocks * _inverse(scales)[..., None], -1, 1)
    # The nearest level; a value halfway between two takes the lower one.
    codes = jnp.searchsorted(_midpoints(LEVELS), scaled, side="left", method="compare_all").astype(jnp.uint8)
    codes = codes.reshape(*weight.shape[:-1], -1, 2)
    return NF4(codes[..., 0] << 4 | codes[..., 1], scales)


def dequantize(stored: NF4) -> Float32[Array, "... i"]:
    """The weight [..., I] that NF4 stands for."""
    # High bits first, as they were packed; levels are looked up and scaled in float32, and nothing is rounded to a
    # narrower type here.
    codes = jnp.stack([stored.codes >> 4, stored.codes & 15], axis=-1)
    codes = codes.reshape(*stored.scales.shape, BLOCK)
    values = jnp.asarray(LEVELS)[codes] * stored.scales[..., None]
    return values.reshape(*stored.codes.shape[:-1], -1)


def quantize_scales(scales: Float32[Array, "... g"], offset: float | None = None) -> Scales8:
    """The scales of one weight in eight bits each.

    Args:
        offset: their mean; None: rounded once from double precision, as no sum in float32 is the same on every machine.
    """
    # Scales are all positive, the code is symmetric around 0: without their mean taken away, half the levels would
    # stand idle.
    mean = jnp.float32(np.asarray(scales, np.float64).mean() if offset is None else offset)
    flat = (scales - mean).reshape(-1)
    padded = pad(flat, (0, -len(flat) % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    largest = jnp.max(jnp.abs(padded), axis=-1)
    scaled = jnp.clip(padded * _inverse(largest)[:, None], -1, 1).reshape(-1)[: len(flat)]
    # bitsandbytes looks the nearest level up in a table of 2^16 places between -1 and 1.
    place = jnp.floor((scaled + 1) * jnp.float32(_PLACES) + 0.5) / jnp.float32(_PLACES) - 1
    codes = jnp.searchsorted(_midpoints(dynamic_levels()), place, side="left").astype(jnp.uint8)
    return Scales8(codes.reshape(scales.shape), largest, mean)


def dequantize_scales(stored: Scales8) -> Float32[Array, "... g"]:
    """The scales that eight bits each stand for."""
    values = jnp.asarray(dynamic_levels())[stored.codes.reshape(-1)]
    repeated = jnp.repeat(stored.scales, SCALE_BLOCK)[: len(values)]
    # A bound that is never reached keeps the compiler from fusing product and sum, which would round once, not twice.
    largest = np.finfo(np.float32).max
    product = jax.lax.clamp(-largest, values * repeated, largest)
    return product.reshape(stored.codes.shape) + stored.offset


def _inverse(scales: Array) -> Array:
    """1 / scales; 0 where a block is all zeros."""
    return jnp.where(scales > 0, 1 / jnp.where(scales > 0, scales, 1), 0)


def _midpoints(levels: np.ndarray) -> Array:
    return jnp.asarray((levels[:-1] + levels[1:]) / np.float32(2))


@functools.cache
def dynamic_levels() -> np.ndarray:
    """The 256 levels of the dynamic code with a sign: seven decades, each with twice the levels of the one below."""
    levels = [0.0, 1.0]
    for decade in range(7):
        count = (1 << decade) + 1
        place = np.arange(count)
        # Each bound rounded once to float32, counted from the nearer end, as torch.linspace has it.
        first, step = np.float64(np.float32(0.1)), np.float64(np.float32(0.9) / np.float32(count - 1))
        rising, falling = first + step * place, 1 - step * place[::-1]
        bounds = np.where(place < count // 2, rising, falling).astype(np.float32)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        levels += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(levels, np.float32))
