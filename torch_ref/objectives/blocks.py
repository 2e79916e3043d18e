"""Rows cut into blocks of tokens, so that a tensor of [B, T, V] never exists whole.

Shapes: B batch, T length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


def block_count(shape: Sequence[int], block: int) -> int:
    """The smallest number of equal pieces along T of [B, T] that hold at most `block` tokens, or one token a row."""
    b, t = shape[:2]
    least = min(-(-b * t // block), t)
    return next(n for n in range(least, t + 1) if t % n == 0)


def split(arrays: Sequence[Shaped[Tensor, "b t ..."]], blocks: int) -> list[tuple[Tensor, ...]]:
    """Cut each [B, T, ...] into `blocks` equal pieces along T: a tuple of all tensors for each piece."""
    return list(zip(*(x.chunk(blocks, dim=1) for x in arrays), strict=True))


def join(pieces: Sequence[Shaped[Tensor, "b c ..."]]) -> Shaped[Tensor, "b t ..."]:
    """The inverse of `split` for one tensor."""
    return torch.cat(list(pieces), dim=1)
