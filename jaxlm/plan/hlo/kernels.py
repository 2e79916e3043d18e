"""FLOP of kernels that the compiler sees as one call: by their names and the shapes of their operands.

What a kernel itself says that it costs is nothing for attention, and for grouped products that of all rows.

Causal attention counts the half that the mask lets through, as `jaxlm.counts.flops` does; a window is not seen here, so
that its attention is counted as if it had none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Count(NamedTuple):
    """FLOP of one call."""

    total: int
    recomputed: int
    """Of these, what the backward kernels compute again: scores, and in one of the two the gradient of the weights."""


_ATTENTION = {"splash_mha_fwd": (2, 0), "splash_mha_dq": (3, 2), "splash_mha_dkv": (4, 1)}
"""Products of queries and keys of each kernel, and how many of them were computed before."""


def count(name: str, operands: Sequence[Sequence[int]], result: Sequence[int], filled: int = 0) -> Count | None:
    """FLOP of the kernel `name`, None if it is not known.

    Args:
        operands: shapes of its operands, those of integers left out.
        result: shape of its last result.
        filled: rows of a grouped product that belong to a group, as the others are not multiplied; 0: all.
    """
    # The splash kernels: each product of [T, H] with [S, H] is 2 T S H for every head, and the causal mask lets half of
    # it through.
    for prefix, (products, again) in _ATTENTION.items():
        if name.startswith((prefix, prefix.replace("mha", "mqa"))):
            heads = [shape for shape in operands if len(shape) >= 3]
            product = math.prod(heads[0]) * heads[1][-2]  # 2 B N T S H, and half of it is masked
            return Count(products * product, again * product)
    tables = [shape for shape in operands if len(shape) >= 2]
    if name.startswith(("gmm", "tgmm")) and tables:  # rows times [D, F] of their expert, or rows of both: [E, D, F]
        # Products of rows that belong to no group are skipped by the kernel, so at most `filled` rows count.
        size = math.prod(tables[0][-2:])
        rows = result[-2] if name.startswith("gmm") else size // result[-2]
        return Count(2 * min(rows, filled or rows) * (size // rows) * result[-1], 0)
    return None
