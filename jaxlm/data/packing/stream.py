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

from jaxlm.data.packing.pieces import Pieces, Rows, lay, lay_text, text_of
from jaxlm.data.shards import Shard


class _Epoch(NamedTuple):
    """One order of the documents: piece k holds `ends[k] - ends[k - 1]` tokens of the shard, from `begins[k]` on."""

    begins: np.ndarray
    ends: np.ndarray
    stops: np.ndarray  # where the piece's document ends in the shard
    rows: np.ndarray
    drawn: np.ndarray  # which pieces have room for fill-in-the-middle


class PackedRows:
    """The endless sequence of packed rows of a shard.

    The last row of an epoch is padded, not dropped: every token is seen once an epoch, a corpus shorter than one row
    works, and the cost is at most one partly filled row. The stream of an epoch begins somewhere in the first T tokens
    of its first document, and what lies before comes last, so that one long document is cut elsewhere in every epoch.

    For fill-in-the-middle a row takes `slack` tokens less, and a document that is drawn counts as `slack` tokens more:
    its first piece then has room to grow, and so has a piece that begins a row in the middle of its document.

    Args:
        draw: share of the documents, and of the rows that begin within one, that are drawn.
        slack: tokens that a drawn piece may grow by.
        documents: the only ones to take; None: all.
    """

    def __init__(
        self,
        shard: Shard,
        seq_len: int,
        *,
        seed: int = 0,
        pad: int = 0,
        draw: float = 0.0,
        slack: int = 0,
        documents: np.ndarray | None = None,
    ) -> None:
        self.shard, self.seq_len, self.seed, self.pad = shard, seq_len, seed, pad
        self._draw, self._slack = draw, slack if draw else 0
        lengths = np.diff(shard.offsets)
        self._documents = np.flatnonzero(lengths) if documents is None else documents[lengths[documents] > 0]
        self.tokens = int(lengths[self._documents].sum())
        self._drawn = round(draw * len(self._documents))
        self._room = seq_len - self._slack
        self.rows_per_epoch = -(-(self.tokens + self._slack * self._drawn) // self._room)
        self._epochs: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: np.ndarray) -> Rows:
        """The rows with these indices [B], counted through all epochs."""
        epochs, within = np.divmod(np.asarray(index, np.int64), self.rows_per_epoch)
        out = self._padding(len(epochs))
        if self._slack:
            return lay(self.shard.tokens, [self.pieces(int(i)) for i in index], self.seq_len, self.pad)
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

    def pieces(self, index: int) -> Pieces:
        """The pieces of a row, counted through all epochs, in their order."""
        number, within = divmod(index, self.rows_per_epoch)
        epoch = self._epoch(number)
        row = int(epoch.rows[within])
        first, last = row * self._room, min((row + 1) * self._room, int(epoch.ends[-1]))
        if last <= first:
            return Pieces.none()
        piece_M = np.arange(
            np.searchsorted(epoch.ends, first, side="right"), np.searchsorted(epoch.ends, last - 1, side="right") + 1
        )
        # The stream counts a drawn document's room to grow as if it stood before the document's first token.
        start_M = np.where(piece_M > 0, epoch.ends[piece_M - 1], 0) + self._slack * epoch.drawn[piece_M]
        from_M = np.maximum(first - start_M, 0)
        to_M = np.minimum(last, epoch.ends[piece_M]) - start_M
        begins_M = epoch.begins[piece_M]
        drawn_M = np.where(from_M > 0, self._draws_row(number, row), epoch.drawn[piece_M])
        pieces = Pieces(begins_M + from_M, begins_M + to_M, epoch.stops[piece_M], drawn_M)
        return Pieces(*(part[to_M > from_M] for part in pieces))

    def _draws_row(self, epoch: int, row: int) -> bool:
        return bool(self._draw and np.random.default_rng([self.seed, epoch, 2, row]).random() < self._draw)

    def _of_epoch(self, epoch: _Epoch, within: np.ndarray) -> Rows:
        first_B = epoch.rows[within] * self.seq_len
        last_B = np.minimum(first_B + self.seq_len, self.tokens)
        # Pieces are looked for where rows begin and end: a search for every token would cost more than all the rest.
        from_B = np.searchsorted(epoch.ends, first_B, side="right")
        count_B = np.searchsorted(epoch.ends, last_B - 1, side="right") + 1 - from_B
        piece_M = np.arange(int(count_B.sum())) + np.repeat(from_B - (np.cumsum(count_B) - count_B), count_B)
        start_M = np.where(piece_M > 0, epoch.ends[piece_M - 1], 0)
        begins_M = epoch.begins[piece_M] + np.maximum(np.repeat(first_B, count_B) - start_M, 0)
        ends_M = epoch.begins[piece_M] + np.minimum(np.repeat(last_B, count_B), epoch.ends[piece_M]) - start_M
        pieces = Pieces(begins_M, ends_M, epoch.stops[piece_M], np.zeros(len(piece_M), bool))
        return lay_text(text_of(self.shard.tokens, pieces), count_B, self.seq_len, self.pad)

    def _padding(self, rows: int) -> Rows:
        shape = (rows, self.seq_len)
        fill = np.full(shape, self.pad, np.int32)
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
        random = np.random.default_rng([self.seed, epoch])
        offsets = np.asarray(self.shard.offsets)
        documents = random.permutation(self._documents)
        begins, stops = offsets[documents], offsets[documents + 1]
        lengths = stops - begins
        if cut := int(random.integers(min(lengths[0], self.seq_len))):
            begins = np.append(begins, begins[0])
            stops = np.append(stops, stops[0])
            lengths = np.append(lengths, cut)
            begins[0] += cut
            lengths[0] -= cut
        rows = random.permutation(self.rows_per_epoch)
        drawn = np.zeros(len(lengths), bool)
        if self._drawn:
            drawn[np.random.default_rng([self.seed, epoch, 1]).permutation(len(documents))[: self._drawn]] = True
        return _Epoch(begins, np.cumsum(lengths + self._slack * drawn), stops, rows, drawn)
