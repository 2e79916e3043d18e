"""Pairs to rows: the first answer is segment 2k-1 and the second 2k of one row, so that a pair never leaves its row.

Which pairs lie in row r of epoch e is a function of (seed, e, r) alone: resuming is one number, and any number of
processes sees the same batch.

Shapes: B rows, T tokens of a row, M segments, P = M / 2 pairs of a row.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.data.best_fit import rows_by_fit
from jaxlm.data.preferences.pairs import Pairs

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `positions`, `segments`, `weights` [B, T]; `margins`, `ties`, `labels` [B, P]."""


class PairRows:
    """The endless sequence of rows; those of an epoch hold each pair once.

    Args:
        most: P, the most pairs of a row; 1 packs nothing.
    """

    def __init__(self, pairs: Pairs, seq_len: int, *, seed: int = 0, pad: int = 0, most: int = 8) -> None:
        self._pairs, self._seq_len, self._seed, self._pad, self._most = pairs, seq_len, seed, pad, most
        self._sizes = (np.diff(pairs.examples.offsets) - 1).reshape(-1, 2).sum(1)
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        # Best fit in falling order makes rows of the same sizes whatever the order of equal pairs.
        self.rows_per_epoch = len(self._epoch(0))

    def __getitem__(self, index: np.ndarray) -> Batch:
        """The rows with these indices [B], counted through all epochs."""
        places = [divmod(int(i), self.rows_per_epoch) for i in np.asarray(index)]
        return self._lay([self._epoch(epoch)[row] for epoch, row in places])

    def first_epoch(self, index: np.ndarray) -> Batch:
        """Like `[]`, but rows after the end of epoch 0 are padding (segment 0 and weight 0 throughout)."""
        rows = self._epoch(0)
        return self._lay([rows[i] if i < len(rows) else np.arange(0) for i in np.asarray(index).tolist()])

    def _lay(self, rows: Sequence[np.ndarray]) -> Batch:
        shape, beside = (len(rows), self._seq_len), (len(rows), self._most)
        batch = {
            "tokens": np.full(shape, self._pad, np.int32),
            "targets": np.full(shape, self._pad, np.int32),
            "positions": np.zeros(shape, np.int32),
            "segments": np.zeros(shape, np.int32),
            "weights": np.zeros(shape, np.float32),
            "margins": np.zeros(beside, np.float32),
            "ties": np.zeros(beside, bool),
            "labels": np.zeros(beside, np.int32),
        }
        for row, members in enumerate(rows):
            at = 0
            for place, pair in enumerate(members.tolist()):
                for side in (0, 1):
                    at = self._lay_answer(batch, row, at, 2 * pair + side, 2 * place + side + 1)
                for name in ("margins", "ties", "labels"):
                    batch[name][row, place] = getattr(self._pairs, name)[pair]
        return batch

    def _lay_answer(self, batch: Batch, row: int, at: int, example: int, segment: int) -> int:
        """Lay one answer with its prompt from place `at` on; returns the place after it."""
        examples = self._pairs.examples
        start, stop = int(examples.offsets[example]), int(examples.offsets[example + 1])
        here = slice(at, at + stop - start - 1)
        batch["tokens"][row, here] = examples.ids[start : stop - 1]
        batch["targets"][row, here] = examples.ids[start + 1 : stop]
        batch["weights"][row, here] = examples.weights[start + 1 : stop]
        batch["positions"][row, here] = np.arange(stop - start - 1)
        batch["segments"][row, here] = segment
        return here.stop

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        with self._lock:
            if epoch not in self._epochs:
                for old in sorted(self._epochs)[:-1]:
                    del self._epochs[old]
                self._epochs[epoch] = self._rows_of(epoch)
            return self._epochs[epoch]

    def _rows_of(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each row of an epoch: by best fit; a row with more than the most pairs is cut into several."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._sizes))
        if self._most == 1 or not len(order):
            return list(order[:, None])
        whole = [random.permutation(row) for row in rows_by_fit(order, self._sizes, self._seq_len)]
        rows = [row[at : at + self._most] for row in whole for at in range(0, len(row), self._most)]
        return [rows[r] for r in random.permutation(len(rows))]


class PairBatches:
    """Batch b is rows `b * batch_size` to `(b + 1) * batch_size`; the state is the number of the next batch."""

    def __init__(self, rows: PairRows, batch_size: int, share: np.ndarray) -> None:
        self._rows, self._batch_size, self._share, self._next = rows, batch_size, share, 0

    def __next__(self) -> Batch:
        self._next += 1
        return self._rows[(self._next - 1) * self._batch_size + self._share]

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the batch of a state."""
        self._next = int(state["next_index"])
