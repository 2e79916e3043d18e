"""Curricula: easy rows first. Which row a draw takes is a function of the draw's number, with nothing kept in between.

The rows of one plan are sorted by difficulty. At step t of `steps`, counted from 1, only the easiest share
`pace(t / steps)` of them, the pool, may be drawn. A draw takes a row of the pool that has not been offered yet, at
random, and any row of the pool when all have been. After the last step of the curriculum the rows not offered yet come,
then ordinary epochs follow.

Shapes: R rows, G groups of draws with one pool each, B draws asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64

GROUPS = 128
"""The pool grows about this many times: a group of steps has the pool of its first step."""

Pace = Callable[[float], float]
"""Share of the rows that may be drawn after this share of the curriculum's steps; both from 0 to 1."""


def linear(start: float) -> Pace:
    """A straight line from `start` to 1."""
    return lambda progress: min(1.0, start + (1 - start) * progress)


def square_root(start: float) -> Pace:
    """`sqrt(t (1 - start^2) + start^2)` (Platanios et al. 2019, equation 7, p = 2): new rows come ever more slowly."""
    return lambda progress: min(1.0, math.sqrt(progress * (1 - start**2) + start**2))


def exponential(start: float) -> Pace:
    """`start^(1 - t)`: the share of new rows in the pool stays the same."""
    return lambda progress: min(1.0, start ** (1 - progress))


def stairs(start: float, count: int = 5) -> Pace:
    """Equal stairs from `start` to 1, the last of them at the full pool."""
    return lambda progress: min(1.0, start + (1 - start) * math.floor(progress * count) / (count - 1))


PACES: dict[str, Callable[[float], Pace]] = {
    "linear": linear,
    "square_root": square_root,
    "exponential": exponential,
    "steps": stairs,
}


def groups(steps: int, pace: Pace, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps before each group [G], and how many rows its pool has [G]: at least one, and all of them in the last."""
    cuts = min(steps, GROUPS)
    evenly = {steps * g // cuts for g in range(cuts)}
    to_the_end = {steps - (1 << k) for k in range(steps.bit_length() - 1)}  # ever shorter, so that the last is one step
    first_G = np.array(sorted(evenly | to_the_end))
    pool_G = np.array([max(1, math.floor(pace((first + 1) / steps) * rows + 1e-9)) for first in first_G])
    return first_G, pool_G


class Curriculum:
    """The order of one source's draws.

    Args:
        difficulty: of each row [R]; ties go by the row's number.
        first_draws: draws of this source before each group [G], and before the end of the curriculum: [G + 1].
        pools: rows in the pool of each group [G], none fewer than in the group before.
        seed: of the order within the pools.
    """

    def __init__(
        self, difficulty: Sequence[float] | np.ndarray, first_draws: np.ndarray, pools: np.ndarray, seed: int
    ) -> None:
        self.easiest_first = np.argsort(np.asarray(difficulty, np.float64), kind="stable")
        self.rows = len(self.easiest_first)
        self._firsts, self._pools, self._seed = np.asarray(first_draws, np.int64), np.asarray(pools, np.int64), seed
        random = np.random.default_rng([seed, 4])
        offered: list[np.ndarray] = []
        self._fresh: list[int] = []
        waiting, pool = np.zeros(0, np.int64), 0
        for draws, size in zip(np.diff(self._firsts).tolist(), self._pools.tolist(), strict=True):
            waiting = random.permutation(np.append(waiting, np.arange(pool, size)))
            taken, waiting, pool = waiting[:draws], waiting[draws:], max(pool, size)
            offered.append(taken)
            self._fresh.append(len(taken))
        self._offered = np.concatenate(offered)
        self._offered_before = np.cumsum([0, *self._fresh])
        self._rest = random.permutation(np.append(waiting, np.arange(pool, self.rows)))
        self.draws = int(self._firsts[-1]) + len(self._rest)

    def __getitem__(self, draws: np.ndarray) -> Int64[np.ndarray, "b"]:
        """Row of each draw [B]. Draws after the curriculum are the ordinary epochs, from the second one on."""
        draws = np.asarray(draws, np.int64)
        out = self.rows + draws - self.draws
        rest = (draws >= self._firsts[-1]) & (draws < self.draws)
        out[rest] = self.easiest_first[self._rest[draws[rest] - self._firsts[-1]]]
        for place in np.flatnonzero(draws < self._firsts[-1]):
            out[place] = self.easiest_first[self._rank(int(draws[place]))]
        return out

    def _rank(self, draw: int) -> int:
        """Place in the order of difficulty of the row that a draw of the curriculum takes."""
        group = int(np.searchsorted(self._firsts, draw, side="right")) - 1
        first, length = int(self._firsts[group]), int(self._firsts[group + 1] - self._firsts[group])
        # Rows offered for the first time are spread over the group, between rows of the pool that come again.
        fresh, within = self._fresh[group], draw - first
        before, after = fresh * within // length, fresh * (within + 1) // length
        if after > before:
            return int(self._offered[self._offered_before[group] + before])
        seen = int(self._pools[group])
        return int(np.random.default_rng([self._seed, 5, draw]).integers(seen))
