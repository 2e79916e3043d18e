"""Documents to rows: which tokens lie in row r of epoch e, as a pure function of (seed, e, r).

Each epoch shuffles the documents, lays them end to end, cuts the stream into rows of T tokens and shuffles the rows.
Nothing is kept between rows, so any row can be made at any time by any process: resuming is one number, and the data
order is the same for every number of processes.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxlm.data.shards import Shard


class Rows(NamedTuple):
    """Packed rows.

    Attributes:
        tokens: the inputs; `pad` at padding.
        targets: the next token of the same document; `pad` where there is none.
        positions: place in the document's piece, from 0.
        segments: 1, 2, 3, ... for the pieces of a row, 0 for padding. No token may attend to another segment.
        weights: 1 where there is a target, 0 at the end of a document and at padding.
    """

    tokens: Int32[np.ndarray, "b t"]
    targets: Int32[np.ndarray, "b t"]
    positions: Int32[np.ndarray, "b t"]
    segments: Int32[np.ndarray, "b t"]
    weights: Float32[np.ndarray, "b t"]


class _Epoch(NamedTuple):
    """One order of the documents: piece k holds `ends[k] - ends[k - 1]` tokens of the shard, from `begins[k]` on."""

    begins: np.ndarray
    ends: np.ndarray
    stops: np.ndarray  # where the piece's document ends in the shard
    rows: np.ndarray


class PackedRows:
    """The endless sequence of packed rows of a shard.

    The last row of an epoch is padded, not dropped: every token is seen once an epoch, a corpus shorter than one row
    works, and the cost is at most one partly filled row. The stream of an epoch begins somewhere in the first T tokens
    of its first document, and what lies before comes last, so that one long document is cut elsewhere in every epoch.
    """

    def __init__(self, shard: Shard, seq_len: int, *, seed: int = 0, pad: int = 0) -> None:
        self._shard, self._seq_len, self._seed, self._pad = shard, seq_len, seed, pad
        self._documents = np.flatnonzero(np.diff(shard.offsets))
        self.tokens = int(shard.offsets[-1])
        self.rows_per_epoch = -(-self.tokens // seq_len)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: np.ndarray) -> Rows:
        """The rows with these indices [B], counted through all epochs."""
        epochs, within = np.divmod(np.asarray(index, np.int64), self.rows_per_epoch)
        out = self._padding(len(epochs))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            for whole, part in zip(out, self._of_epoch(self._epoch(int(epoch)), within[here]), strict=True):
                whole[here] = part
        return out

    def first_epoch(self, index: np.ndarray) -> Rows:
        """Like `[]`, but rows after the end of epoch 0 are padding (segment 0 and weight 0 throughout)."""
        index = np.asarray(index, np.int64)
        real = index < self.rows_per_epoch
        out = self._padding(len(index))
        if real.any():
            for whole, part in zip(out, self[index[real]], strict=True):
                whole[real] = part
        return out

    def _of_epoch(self, epoch: _Epoch, within: np.ndarray) -> Rows:
        place_BT = epoch.rows[within][:, None] * self._seq_len + np.arange(self._seq_len)
        real_BT = place_BT < self.tokens
        place_BT = np.minimum(place_BT, self.tokens - 1)
        piece_BT = np.searchsorted(epoch.ends, place_BT, side="right")
        piece_start_BT = np.where(piece_BT > 0, epoch.ends[piece_BT - 1], 0)
        source_BT = epoch.begins[piece_BT] + place_BT - piece_start_BT
        target_BT = real_BT & (source_BT + 1 < epoch.stops[piece_BT])
        next_BT = np.minimum(source_BT + 1, self.tokens - 1)
        return Rows(
            tokens=np.where(real_BT, self._shard.tokens[source_BT], self._pad).astype(np.int32),
            targets=np.where(target_BT, self._shard.tokens[next_BT], self._pad).astype(np.int32),
            positions=np.where(real_BT, place_BT - np.maximum(piece_start_BT, place_BT[:, :1]), 0).astype(np.int32),
            segments=np.where(real_BT, piece_BT - piece_BT[:, :1] + 1, 0).astype(np.int32),
            weights=target_BT.astype(np.float32),
        )

    def _padding(self, rows: int) -> Rows:
        shape = (rows, self._seq_len)
        fill = np.full(shape, self._pad, np.int32)
        zero = np.zeros(shape, np.int32)
        return Rows(fill, fill.copy(), zero, zero.copy(), np.zeros(shape, np.float32))

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self._shuffle(epoch)
                for old in sorted(self._epochs)[:-2]:  # a batch may reach into the next epoch, never further back
                    if old != epoch:
                        del self._epochs[old]
            return self._epochs[epoch]

    def _shuffle(self, epoch: int) -> _Epoch:
        random = np.random.default_rng([self._seed, epoch])
        offsets = np.asarray(self._shard.offsets)
        documents = random.permutation(self._documents)
        begins, stops = offsets[documents], offsets[documents + 1]
        lengths = stops - begins
        if cut := int(random.integers(min(lengths[0], self._seq_len))):
            begins = np.append(begins, begins[0])
            stops = np.append(stops, stops[0])
            lengths = np.append(lengths, cut)
            begins[0] += cut
            lengths[0] -= cut
        return _Epoch(begins, np.cumsum(lengths), stops, random.permutation(self.rows_per_epoch))
