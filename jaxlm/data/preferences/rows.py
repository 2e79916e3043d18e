"""Pairs to rows: the first answer is segment 2k-1 and the second 2k of one row, so that a pair never leaves its row.

Which pairs lie in row r of epoch e is a function of (seed, e, r) alone: see `data.rows.epochs`.

Shapes: B rows, T tokens of a row, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.data.best_fit import rows_by_fit
from jaxlm.data.preferences.pairs import Pairs
from jaxlm.data.rows.epochs import Batch, EpochRows, lay_examples


class PairRows(EpochRows):
    """The endless sequence of rows; those of an epoch hold each pair once.

    Args:
        most: P, the most pairs of a row; 1 packs nothing.
    """

    def __init__(self, pairs: Pairs, seq_len: int, *, seed: int = 0, pad: int = 0, most: int = 8) -> None:
        self._pairs, self._seq_len, self._seed, self._pad, self._most = pairs, seq_len, seed, pad, most
        self._sizes = (np.diff(pairs.examples.offsets) - 1).reshape(-1, 2).sum(1)
        super().__init__()

    def lay(self, rows: Sequence[np.ndarray]) -> Batch:
        """The arrays of conversations [B, T], and `margins`, `ties`, `labels` [B, P] of the pairs of each row."""
        sides = [[2 * pair + side for pair in row.tolist() for side in (0, 1)] for row in rows]
        batch = lay_examples(self._pairs.examples, sides, self._seq_len, self._pad)
        for name in ("margins", "ties", "labels"):
            of_pairs = getattr(self._pairs, name)
            batch[name] = np.zeros((len(rows), self._most), of_pairs.dtype)
            for row, members in enumerate(rows):
                batch[name][row, : len(members)] = of_pairs[members]
        return batch

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each row of an epoch: by best fit; a row with more than the most pairs is cut into several."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._sizes))
        if self._most == 1 or not len(order):
            return list(order[:, None])
        whole = [random.permutation(row) for row in rows_by_fit(order, self._sizes, self._seq_len)]
        rows = [row[at : at + self._most] for row in whole for at in range(0, len(row), self._most)]
        return [rows[r] for r in random.permutation(len(rows))]
