"""Mixtures: which source row n of a run belongs to, and which of that source's rows it is, as a function of n alone.

Every source has a target, the number of rows that it should have after n rows; after any n rows it has that number to
within one row. The state at every `BLOCK`th row is in closed form (Webster's divisor method: counts are the rounded
targets at the one time where they add up to n). Between two such states rows go to the earliest deadline, which is
always feasible (Baruah et al. 1996, "Proportionate progress", theorem 1). So any row costs the same, and nothing is
kept. Shares are of the tokens that carry loss: a source whose rows carry fewer of them gets more rows.

Shapes: S sources, B rows asked for, R rows of a block.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from jaxlm.data.rows.shares import Share, Targets, from_row, targets

BLOCK = 512
"""Rows between two states in closed form."""


class _Part(NamedTuple):
    """The rows from `start` on, where each source has had `base` rows."""

    start: int
    base: np.ndarray
    targets: Targets


class Mixture:
    """Rows of a run to sources: see the top of the file. A later part begins where the weights were changed by hand."""

    def __init__(self, targets: Targets) -> None:
        self.sources = targets.before.shape[1]
        self._parts = [_Part(0, np.zeros(self.sources, np.int64), targets)]
        self._blocks: dict[tuple[int, int], tuple[int, np.ndarray, np.ndarray]] = {}

    @property
    def end(self) -> float:
        """Rows after which no source is left."""
        last = self._parts[-1]
        return last.start + last.targets.end

    def then(self, row: int, following: Sequence[Share], *, stop_with: int | None = None) -> Mixture:
        """This mixture up to `row`, and from there on these shares; every source goes on where it stands then.

        The rows in `following` count from the beginning of the run, and so do the caps.
        """
        base = self.counts(row)
        moved = [
            share._replace(weights=from_row(share.weights, row), cap=max(0.0, share.cap - int(had)))
            for share, had in zip(following, base, strict=True)
        ]
        out = Mixture(self._parts[0].targets)
        out._parts = [part for part in self._parts if part.start < row]
        out._parts.append(_Part(row, base, targets(moved, stop_with=stop_with)))
        return out

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [B] and number within the source [B] of these rows [B], none of which lies beyond `end`."""
        rows = np.asarray(rows, np.int64)
        source_B, number_B = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        todo = np.ones(len(rows), bool)
        while todo.any():
            index, part = self._part(int(rows[todo][0]))
            after = self._parts[index + 1].start if index + 1 < len(self._parts) else math.inf
            local = rows - part.start
            start, sources, numbers = self._block(index, part, int(local[todo][0]))
            here = todo & (local >= start) & (local < start + len(sources)) & (rows < after)
            source_B[here] = sources[local[here] - start]
            number_B[here] = numbers[local[here] - start]
            todo &= ~here
        return source_B, number_B

    def counts(self, row: int) -> Int64[np.ndarray, "s"]:
        """Rows that each source has had before `row`."""
        index, part = self._part(row - 1)  # the rows before a change belong to the part before it
        local = row - part.start
        if local <= 0:
            return part.base.copy()
        start, sources, _ = self._block(index, part, local - 1)
        had = np.bincount(sources[: local - start], minlength=self.sources)
        return part.base + _state(part.targets, start) + had

    def wanted(self, row: int) -> Float64[np.ndarray, "s"]:
        """Rows that each source should have had before `row`, to a fraction of a row."""
        _, part = self._part(row - 1)
        return part.base + part.targets.at(np.array([float(row - part.start)]))[0]

    def _part(self, row: int) -> tuple[int, _Part]:
        index = max(i for i, part in enumerate(self._parts) if part.start <= max(row, 0))
        return index, self._parts[index]

    def _block(self, index: int, part: _Part, local: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The block with this row of a part: its first row, sources and numbers."""
        number = local // BLOCK
        first = _boundary(part.targets, number)
        if local < first:
            number, first = number - 1, _boundary(part.targets, number - 1)
        if (index, number) not in self._blocks:
            if len(self._blocks) > 8:
                self._blocks.clear()
            last = min(_boundary(part.targets, number + 1), int(min(part.targets.end, 2**62)))
            self._blocks[index, number] = first, *_deal(part.targets, part.base, first, last)
        return self._blocks[index, number]


def _boundary(targets: Targets, number: int) -> int:
    """The first row from `number * BLOCK` on at which the closed form lies within one row of the targets."""
    first = number * BLOCK
    if first == 0:
        return 0
    for row in range(first, first + BLOCK // 2):
        if row >= targets.end:
            return row
        if np.all(np.abs(_state(targets, row) - targets.at(np.array([float(row)]))[0]) < 1):
            return row
    return first


def _state(targets: Targets, row: int) -> Int64[np.ndarray, "s"]:
    """Rows of each source after `row` rows, by Webster's method: targets at one time, rounded, that add up to `row`."""
    if row == 0:
        return np.zeros(targets.before.shape[1], np.int64)

    def rounded(time: float) -> np.ndarray:
        return np.floor(targets.at(np.array([time]))[0] + 0.5)

    sources = targets.before.shape[1]
    low, high = max(0.0, row - sources), float(row + sources)
    for _ in range(80):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if rounded(middle).sum() <= row else (low, middle)
    counts = rounded(low).astype(np.int64)
    # Several sources may come to their next row at the same time: the first of them are served first.
    for source in np.flatnonzero(rounded(high) > counts)[: max(0, row - int(counts.sum()))]:
        counts[source] += 1
    if counts.sum() != row:  # at the end, where every source has its cap, time stands still
        spare = row - int(counts.sum())
        order = np.argsort(counts - targets.at(np.array([float(row)]))[0], kind="stable")
        for source in order[:spare] if spare > 0 else order[::-1][:-spare]:
            counts[source] += 1 if spare > 0 else -1
    return counts


def _deal(targets: Targets, base: np.ndarray, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources and numbers of the rows from `first` to `last`, by earliest deadline between the two states."""
    begin, end = _state(targets, first), _state(targets, last)
    target_RS = targets.at(np.arange(first, last + 1, dtype=np.float64))
    jobs: list[tuple[int, int, int]] = []
    for source in range(len(begin)):
        number = np.arange(begin[source], end[source])
        column = target_RS[:, source]
        # Number k may come as soon as the target after it exceeds k, and must before the target reaches k + 1.
        release = np.searchsorted(column[1:], number, side="right")
        latest = np.searchsorted(column, number + 1, side="left") - 1
        jobs += zip(release.tolist(), latest.tolist(), [source] * len(number), strict=True)
    jobs.sort()
    source_R = np.empty(last - first, np.int64)
    waiting: list[tuple[int, int]] = []
    following = 0
    for slot in range(last - first):
        while following < len(jobs) and (jobs[following][0] <= slot or not waiting):
            heapq.heappush(waiting, jobs[following][1:])
            following += 1
        source_R[slot] = heapq.heappop(waiting)[1]
    number_R = np.empty_like(source_R)
    for source in range(len(begin)):
        here = np.flatnonzero(source_R == source)
        number_R[here] = base[source] + begin[source] + np.arange(len(here))
    return source_R, number_R
