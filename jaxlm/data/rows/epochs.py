"""Rows of whole examples, epoch after epoch: an endless sequence by number, and its batches.

Which examples lie in row r of epoch e is a function of (seed, e, r) alone: resuming is one number, and any number of
processes sees the same batch.

Shapes: B rows, T tokens of a row, M examples, N tokens of all examples.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]


@runtime_checkable
class Laid(Protocol):
    """Tokens of many examples, one after the other; example m is `offsets[m]` to `offsets[m + 1]`."""

    @property
    def ids(self) -> Any: ...

    @property
    def weights(self) -> Any: ...

    @property
    def offsets(self) -> Any: ...


class EpochRows(ABC):
    """The endless sequence of rows; those of an epoch hold each member once."""

    def __init__(self) -> None:
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()
        # Every epoch has as many rows as the first: members of equal sizes only change places.
        self.rows_per_epoch = len(self._epoch(0))

    @abstractmethod
    def plan(self, epoch: int) -> list[np.ndarray]:
        """The members of each row of an epoch."""

    @abstractmethod
    def lay(self, rows: Sequence[np.ndarray]) -> Batch:
        """The arrays of these rows, by their members."""

    def __getitem__(self, index: np.ndarray) -> Batch:
        """The rows with these indices [B], counted through all epochs."""
        places = [divmod(int(i), self.rows_per_epoch) for i in np.asarray(index)]
        return self.lay([self._epoch(epoch)[row] for epoch, row in places])

    def once(self, batch_size: int, share: np.ndarray, most: int = 0) -> Iterator[Batch]:
        """The batches of epoch 0, filled up with empty rows; `most` of them, 0: all."""
        rows = self._epoch(0)
        for first in range(0, min(len(rows), (most or len(rows)) * batch_size), batch_size):
            numbers = (first + share).tolist()
            yield self.lay([rows[i] if i < len(rows) else np.arange(0) for i in numbers])

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        with self._lock:
            if epoch not in self._epochs:
                for old in sorted(self._epochs)[:-1]:
                    del self._epochs[old]
                self._epochs[epoch] = self.plan(epoch)
            return self._epochs[epoch]


class NumberedBatches:
    """Batch b is rows `b * batch_size` to `(b + 1) * batch_size`; the state is the number of the next batch."""

    def __init__(self, rows: EpochRows, batch_size: int, share: np.ndarray) -> None:
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


def lay_examples(examples: Laid, rows: Sequence[Sequence[int]], seq_len: int, pad: int) -> Batch:
    """`tokens`, `targets`, `positions`, `segments` and `weights` [B, T] of the examples of each row, one by one.

    An example of n tokens takes n - 1 places, since each place holds a token and its target. What is left is padding:
    segment 0 and weight 0.
    """
    shape = len(rows), seq_len
    batch: Batch = {name: np.full(shape, pad, np.int32) for name in ("tokens", "targets")}
    batch |= {name: np.zeros(shape, np.int32) for name in ("positions", "segments")}
    batch["weights"] = np.zeros(shape, np.float32)
    for row, members in enumerate(rows):
        at = 0
        for segment, member in enumerate(members, 1):
            start, stop = int(examples.offsets[member]), int(examples.offsets[member + 1])
            here = slice(at, at + stop - start - 1)
            batch["tokens"][row, here] = examples.ids[start : stop - 1]
            batch["targets"][row, here] = examples.ids[start + 1 : stop]
            batch["weights"][row, here] = examples.weights[start + 1 : stop]
            batch["positions"][row, here] = np.arange(stop - start - 1)
            batch["segments"][row, here] = segment
            at = here.stop
    return batch
