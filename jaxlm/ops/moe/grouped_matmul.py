"""The grouped matrix product: rows sorted by group, each times the matrix of its group.

`ragged` is `jax.lax.ragged_dot`, which every backend has. `megablox` is the Pallas kernel of that name in JAX, for
TPUs: float32 or bfloat16, and it works only on tiles that have rows.

Shapes: R rows, G groups, I inputs, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.typed_jax import custom_vjp, pad, platform_dependent

GROUPED = ("ragged", "megablox")


def grouped_dot(
    x_RI: Float[Array, "r i"],
    kernels_GIO: Float[Array, "g i o"],
    sizes_G: Int[Array, " g"],
    *,
    impl: str = "ragged",
    dtype: Any = None,
) -> Float[Array, "r o"]:
    """`x_RI @ kernels_GIO[group of the row]`, zeros for the rows behind the last group.

    Args:
        sizes_G: rows of each group, in order.
        impl: one of `GROUPED`.
        dtype: of the result; default: that of x.
    """
    dtype = jnp.dtype(dtype or x_RI.dtype)
    if impl == "megablox":
        return _megablox(x_RI, kernels_GIO, sizes_G.astype(jnp.int32), dtype)
    return jax.lax.ragged_dot(x_RI, kernels_GIO, sizes_G, preferred_element_type=dtype)


def tiles(rows: int, inputs: int, outputs: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, inputs and outputs of a tile: multiples of 128, as the matrix unit takes them, in the 16 MiB of a v5e."""

    def fit(size: int, most: int) -> int:
        return min(most, -(-size // 128) * 128)

    # Tiles of both operands and of the result lie in fast memory together: half as many elements a side when they are
    # twice as wide.
    side = 2048 // itemsize
    return fit(rows, 512), fit(inputs, side), fit(outputs, side)


@custom_vjp(3)
def _megablox(x_RI: Array, kernels_GIO: Array, sizes_G: Array, dtype: Any) -> Array:
    return _gmm(x_RI, kernels_GIO, sizes_G, dtype)


def _on_tpu(kernel: Callable[..., Array], *arrays: Array) -> Array:
    """The kernel compiled where the program is compiled for TPUs, and interpreted elsewhere: slow, for tests."""
    interpreted = functools.partial(kernel, interpret=True)
    return platform_dependent(*arrays, tpu=kernel, default=interpreted)


def _gmm(x: Array, kernels: Array, sizes: Array, dtype: Any, transpose: bool = False) -> Array:
    """The kernel takes whole tiles of rows, and leaves what no group has as it found it in memory."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # importing Pallas takes a second

    rows, (inputs, outputs) = len(x), kernels.shape[1:] if not transpose else kernels.shape[:0:-1]
    tiling = tiles(rows, inputs, outputs, x.dtype.itemsize)
    # The kernel refuses a last tile that is not full. The rows it adds belong to no group, and so do those behind the
    # sum of the sizes: their memory is never written and must not be read.
    x = pad(x, ((0, -rows % tiling[0]), (0, 0)))
    product = functools.partial(
        cast(Callable[..., Array], gmm), preferred_element_type=dtype, tiling=tiling, transpose_rhs=transpose
    )
    y = _on_tpu(product, x, kernels, sizes)
    return jnp.where((jnp.arange(rows) < jnp.sum(sizes))[:, None], y[:rows], 0)


Kept = tuple[Array, Array, Array]
"""Rows, kernels and sizes."""


def _forward(x_RI: Array, kernels_GIO: Array, sizes_G: Array, dtype: Any) -> tuple[Array, Kept]:
    return _megablox(x_RI, kernels_GIO, sizes_G, dtype), (x_RI, kernels_GIO, sizes_G)


def _backward(dtype: Any, kept: Kept, dy: Array) -> tuple[Array, Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, kernels, sizes = kept
    dy = dy.astype(x.dtype)  # as ragged_dot's gradient has it: products of narrow numbers, added wide
    tiling = tiles(len(x), x.shape[1], kernels.shape[2], x.dtype.itemsize)
    # The gradient of the kernels is one product for each group, over its rows. Rows of padding belong to no group and
    # add nothing.
    x_padded, dy_padded = (pad(rows, ((0, -len(x) % tiling[0]), (0, 0))) for rows in (x, dy))
    product = functools.partial(cast(Callable[..., Array], tgmm), preferred_element_type=kernels.dtype, tiling=tiling)
    dkernels = _on_tpu(product, x_padded.T, dy_padded, sizes)
    return _gmm(dy, kernels, sizes, x.dtype, transpose=True), dkernels, None


_megablox.defvjp(_forward, _backward)
