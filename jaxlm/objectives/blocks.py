"""Rows cut into blocks of tokens, so that an array of [B, T, V] never exists whole.

Shapes: B batch, T length.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped


def block_count(shape: Sequence[int], block: int) -> int:
    """The smallest number of equal pieces along T of [B, T] that hold at most `block` tokens, or one token a row."""
    b, t = shape[:2]
    least = min(-(-b * t // block), t)
    return next(n for n in range(least, t + 1) if t % n == 0)


def split(arrays: PyTree[Shaped[Array, "b t ..."]], blocks: int) -> PyTree[Shaped[Array, "blocks b _ ..."]]:
    """Cut [B, T, ...] into `blocks` equal pieces along T, stacked in front."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0), arrays)


def join(pieces: PyTree[Shaped[Array, "blocks b c ..."]]) -> PyTree[Shaped[Array, "b t ..."]]:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), pieces)
