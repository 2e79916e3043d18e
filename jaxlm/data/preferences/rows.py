"""Pairs to rows: the first answer is segment 2k-1 and the second 2k of one row, so that a pair never leaves its row.

Which pairs lie in row r of epoch e is a function of (seed, e, r) alone: see `data.rows.epochs`.

Shapes: B rows, T tokens of a row, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxlm.data.packing.best_fit import rows_by_fit
from jaxlm.data.preferences.pairs import Pairs
from jaxlm.data.rows.epochs import Batch, EpochRows, lay_examples

REFERENCE_LOGPS = "reference_logps"
"""The column of what a reference thinks of each answer, where that was computed before training."""
DIVERGENCE = ("divergence_total", "divergence_weight")
"""The columns of a microbatch with the sums of KTO's divergence over the whole batch."""


class PairRows(EpochRows):
    """The endless sequence of rows; those of an epoch hold each pair once.

    Args:
        most: P, the most pairs of a row; 1 packs nothing.
        swapped: lay the second answer before the first.
        reference: log-probability of each answer [2 x pairs] under a reference, for the column `reference_logps`.
    """

    def __init__(
        self,
        pairs: Pairs,
        seq_len: int,
        *,
        seed: int = 0,
        pad: int = 0,
        most: int = 8,
        swapped: bool = False,
        reference: np.ndarray | None = None,
    ) -> None:
        self._pairs, self._seq_len, self._seed, self._pad, self._most = pairs, seq_len, seed, pad, most
        self._reference, self._order = reference, (1, 0) if swapped else (0, 1)
        self._count = len(pairs)
        self._members, self._sizes, self._widest = _units(pairs, seq_len, most)
        super().__init__()

    def lay(self, rows: Sequence[np.ndarray]) -> Batch:
        """The arrays of conversations [B, T], and `margins`, `ties`, `labels` [B, P] of the pairs of each row.

        With a reference also `reference_logps` [B, M] of its answers, 0 where the row has none.
        """
        sides = [[2 * pair + side for pair in row.tolist() for side in self._order] for row in rows]
        batch = lay_examples(self._pairs.examples, sides, self._seq_len, self._pad)
        for name in ("margins", "ties", "labels"):
            of_pairs = getattr(self._pairs, name)
            batch[name] = np.zeros((len(rows), self._most), of_pairs.dtype)
            for row, members in enumerate(rows):
                batch[name][row, : len(members)] = of_pairs[members]
        if self._reference is not None:
            batch[REFERENCE_LOGPS] = np.zeros((len(rows), 2 * self._most), self._reference.dtype)
            for row, answers in enumerate(sides):
                batch[REFERENCE_LOGPS][row, : len(answers)] = self._reference[answers]
        return batch

    def by_answer(self, numbers: Iterable[np.ndarray]) -> np.ndarray:
        """Numbers [B, M] of the segments of each batch of `once`, as one array of all answers [2 x pairs].

        NaN for answers of which no batch came.
        """
        found_RM = np.concatenate(list(numbers))
        values = np.full(2 * self._count, np.nan, found_RM.dtype)
        for members, numbers_M in zip(self._epoch(0), found_RM, strict=False):  # the last batch is filled up
            for place, pair in enumerate(members.tolist()):
                values[[2 * pair + side for side in self._order]] = numbers_M[2 * place : 2 * place + 2]
        return values

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each row of an epoch: by best fit; a row with more than the most pairs is cut into several.

        Where units of two exist a row has at most half as many units as pairs, whatever they are: so every epoch has
        the same number of rows.
        """
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._sizes))
        if self._most == 1 or not len(order):
            return list(order[:, None])
        whole = [random.permutation(row) for row in rows_by_fit(order, self._sizes, self._seq_len)]
        units = self._most // self._widest
        rows = [row[at : at + units] for row in whole for at in range(0, len(row), units)]
        return [np.concatenate([self._members[unit] for unit in rows[r]]) for r in random.permutation(len(rows))]


def _units(pairs: Pairs, seq_len: int, most: int) -> tuple[list[np.ndarray], np.ndarray, int]:
    """The pairs that lie in one row together, how many places those take, and the most of them.

    Those of one number in `pairs.units`, where they fit into a row, else each pair by itself.
    """
    sizes = (np.diff(pairs.examples.offsets) - 1).reshape(-1, 2).sum(1)
    members = np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(pairs.units)) + 1) if len(pairs) else []
    apart = [unit for unit in members if len(unit) > most or sizes[unit].sum() > seq_len]
    whole = [unit for unit in members if len(unit) <= most and sizes[unit].sum() <= seq_len]
    units = [*whole, *(pair for unit in apart for pair in np.split(unit, len(unit)))]
    units.sort(key=lambda unit: int(unit[0]))
    total = np.array([sizes[unit].sum() for unit in units], np.int64)
    return units, total, max((len(unit) for unit in units), default=1)
