"""Best fit: each piece into the fullest row that has room for it, and where a long document is cut.

Shapes: M pieces.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

LINE_SHARE = 512
"""A long document is cut at a line end that lies within 1/512 of a row before the place."""


def rows_by_fit(order_M: np.ndarray, sizes: np.ndarray, capacity: int) -> list[np.ndarray]:
    """The pieces of each row: `order_M` by best fit, the largest first and equal ones as they stand.

    Args:
        order_M: numbers of pieces.
        sizes: of all pieces, at most `capacity` each.
    """
    order_M = order_M[np.argsort(-sizes[order_M], kind="stable")]
    row_M, count = best_fit(sizes[order_M], capacity)
    by_row = np.argsort(row_M, kind="stable")
    bounds = np.searchsorted(row_M[by_row], np.arange(count + 1))
    return [order_M[by_row[start:stop]] for start, stop in itertools.pairwise(bounds)]


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Put pieces, in this order, each into the fullest row with room for it, or into a new row.

    Rows by free space, and which amounts of free space occur as the bits of one integer: a piece costs one shift.

    Args:
        sizes: of the pieces [M], at most `capacity` each.

    Returns:
        The row of each piece [M], and how many rows there are.
    """
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    occurring, rows = 0, 0
    row_M: list[int] = []
    for size in sizes.tolist():
        fitting = occurring >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            open_rows = by_space[space]
            row = open_rows.pop()
            if not open_rows:
                occurring ^= 1 << space
        else:
            space, row, rows = capacity, rows, rows + 1
        if left := space - size:
            by_space[left].append(row)
            occurring |= 1 << left
        row_M.append(row)
    return np.asarray(row_M, np.int64), rows


def cut_document(
    begin: int, stop: int, size: int, short: int, ends_line: Callable[[int, int], np.ndarray]
) -> list[int]:
    """Where to cut a document of more than `size` tokens: into as few pieces as possible, all but one of `size`.

    A cut moves to a line end that is near, as long as the short piece, which grows by it, stays within `size`.

    Args:
        short: which piece is the short one, counted from 0.
        ends_line: for two places, whether each token between them ends a line.

    Returns:
        The cuts, `begin` and `stop` among them.
    """
    pieces = -(-(stop - begin) // size)
    spare, near = pieces * size - (stop - begin), size // LINE_SHARE
    short %= pieces
    left, right = [begin], [stop]
    for _ in range(short):
        cut = left[-1] + size
        reach = min(near, spare)
        found = np.flatnonzero(ends_line(cut - reach - 1, cut) if reach else [])
        moved = reach - int(found[-1]) if len(found) else 0
        spare -= moved
        left.append(cut - moved)
    for _ in range(pieces - 1 - short):
        cut = right[-1] - size
        reach = min(near, spare)
        found = np.flatnonzero(ends_line(cut - 1, cut + reach) if reach else [])
        moved = int(found[0]) if len(found) else 0
        spare -= moved
        right.append(cut + moved)
    return [*left, *reversed(right)]
