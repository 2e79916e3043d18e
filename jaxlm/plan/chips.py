"""Chips as their vendors describe them: memory, arithmetic, links. Figures are of one chip, bytes and FLOP a second.

TPU: https://cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x, each under "System architecture"; prices on demand
of https://cloud.google.com/tpu/pricing (us-central1 or the only region, 2025). GPU: NVIDIA's datasheets of A100, H100,
H200 and HGX B200 (SXM, dense bfloat16); hosts as NVIDIA's DGX of the same chip, one network card a GPU. Their prices
differ too much from vendor to vendor to name one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One accelerator, as JAX sees it: a device."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    hbm: int
    """Memory, in bytes."""
    flops: float
    """Peak of dense bfloat16 matrix products."""
    hbm_bandwidth: float
    link: float
    """One direction of one link: of a TPU to its neighbour along one dimension, of a GPU to its NVLink switch."""
    network: float
    """One direction of a chip's share of its host's network cards, between hosts of GPUs or slices of TPUs."""
    host: int
    """Devices of one host."""
    dims: int = 0
    """Dimensions of a TPU's torus."""
    wrap: int = 0
    """A side that is a multiple of this closes to a ring."""
    largest: int = 0
    """Chips of the largest slice; 0: it ends nowhere."""
    price: float | None = None
    """USD for an hour of one device."""


_TPU = {
    # links = bidirectional bandwidth of the chip / 2 directions / links (4 in a plane, 6 in space)
    "v4": Chip("v4", "tpu", 32 * GIB, 275e12, 1228e9, 300e9 / 2 / 3, 25e9 / 4, 4, 3, 4, 4096, 3.22),
    "v5e": Chip("v5e", "tpu", 16 * GIB, 197e12, 819e9, 400e9 / 8, 25e9 / 8, 4, 2, 16, 256, 1.20),
    "v5p": Chip("v5p", "tpu", 95 * GIB, 459e12, 2765e9, 1200e9 / 12, 50e9 / 8, 4, 3, 4, 6144, 4.20),
    "v6e": Chip("v6e", "tpu", 32 * GIB, 918e12, 1638e9, 800e9 / 8, 100e9 / 8, 4, 2, 16, 256, 2.70),
    # Two devices a chip, each with half of everything; JAX counts devices.
    "v7x": Chip("v7x", "tpu", 96 * GIB, 2307e12 / 2, 7380e9 / 2, 1200e9 / 12 / 2, 100e9 / 8 / 2, 8, 3, 4, 9216),
}
_GPU = {
    "a100": Chip("a100", "gpu", 80 * 10**9, 312e12, 2039e9, 300e9, 200e9 / 8, 8),
    "a100-40": Chip("a100-40", "gpu", 40 * 10**9, 312e12, 1555e9, 300e9, 200e9 / 8, 8),
    "a100-80": Chip("a100-80", "gpu", 80 * 10**9, 312e12, 2039e9, 300e9, 200e9 / 8, 8),
    "h100": Chip("h100", "gpu", 80 * 10**9, 989e12, 3350e9, 450e9, 400e9 / 8, 8),
    "h200": Chip("h200", "gpu", 141 * 10**9, 989e12, 4800e9, 450e9, 400e9 / 8, 8),
    "b200": Chip("b200", "gpu", 180 * 10**9, 2250e12, 8000e9, 900e9, 400e9 / 8, 8),
}
# A core of a server and its share of memory: an order of magnitude, so that a plan for virtual devices has every line.
_CPU = {"cpu": Chip("cpu", "cpu", 4 * GIB, 1e11, 10e9, 10e9, 1e9, 2**31)}
CHIPS = _TPU | _GPU | _CPU
