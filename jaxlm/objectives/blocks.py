"""Rows cut into blocks of tokens, so that an array of [B, T, V] never exists whole.

Shapes: B batch, T length, S blocks of C tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxlm.typed_jax import tree_map

_Tree = TypeVar("_Tree")
"""A tree of arrays."""


def block_count(shape: Sequence[int], block: int) -> int:
    """The smallest number of equal pieces along T of [B, T] that hold at most `block` tokens, or one token a row."""
    b, t = shape[:2]
    least = min(-(-b * t // block), t)
    return next(n for n in range(least, t + 1) if t % n == 0)


def split(arrays: _Tree, blocks: int) -> _Tree:
    """Cut each array [B, T, ...] of a tree into `blocks` equal pieces along T, stacked in front."""

    def cut(x_BT: Shaped[Array, "b t ..."]) -> Shaped[Array, "blocks b c ..."]:
        return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], blocks, -1, *x_BT.shape[2:]), 1, 0)

    return tree_map(cut, arrays)


def join(pieces: _Tree) -> _Tree:
    """The inverse of `split`."""

    def joined(x_SBC: Shaped[Array, "blocks b c ..."]) -> Shaped[Array, "b t ..."]:
        return jnp.moveaxis(x_SBC, 0, 1).reshape(x_SBC.shape[1], -1, *x_SBC.shape[3:])

    return tree_map(joined, pieces)
