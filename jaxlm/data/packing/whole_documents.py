"""Best-fit packing: documents that fit into a row are never cut (Ding et al. 2024, "Fewer truncations").

A document longer than a row is cut into pieces as long as a row. The pieces of an epoch, longest first, go each into
the fullest row that still has room. Every epoch has another plan, made of the seed and the number of the epoch alone:
pieces of nearly one length change places, and the short piece of a long document comes at another place. All plans
have the same number of rows, so that the row of a number is found without the plans of earlier epochs.

Shapes: B rows, M pieces.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import numpy as np

from jaxlm.data.packing.best_fit import best_fit, cut_document
from jaxlm.data.packing.pieces import Pieces, Rows, lay, lay_text, text_of
from jaxlm.data.shards import Shard

WINDOW = 1 << 20
"""Pieces that are sorted together. Rows left open by one window are filled by the next."""

Remember = Callable[[str, Callable[[], np.ndarray]], np.ndarray]
"""Returns the array of this name, made now if it is not there yet."""


class BestFitRows:
    """The endless sequence of rows of a shard, packed by best fit. See `stream.PackedRows` for the same by stream.

    Args:
        line_ends: for each token id, whether its text ends with a line end; None: cuts do not look for lines.
        draw: share of the pieces that are drawn, and get `slack` more tokens of room: fill-in-the-middle adds them.
        remember: keeps plans; see `Remember`.
        documents: the only ones to take; None: all.
    """

    def __init__(
        self,
        shard: Shard,
        seq_len: int,
        *,
        seed: int = 0,
        pad: int = 0,
        line_ends: np.ndarray | None = None,
        draw: float = 0.0,
        slack: int = 0,
        remember: Remember | None = None,
        documents: np.ndarray | None = None,
    ) -> None:
        self.shard, self.seq_len, self.pad = shard, seq_len, pad
        self._seed, self._line_ends = seed, line_ends
        self._draw, self._slack = draw, slack if draw else 0
        self._chosen = "" if documents is None else f"-{hashlib.sha256(documents.tobytes()).hexdigest()[:12]}"
        self._remember = remember or (lambda name, make: make())
        lengths = np.diff(shard.offsets)
        self._documents = np.flatnonzero(lengths) if documents is None else documents[lengths[documents] > 0]
        self._plans: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        reference = self._remember(f"{self._name()}-reference", lambda: self._plan(None, 0.0))
        rows = int(reference[-1, 0]) + 1
        self.rows_per_epoch = rows + (1 + rows // 1000 if self._slack else rows // 2000)

    def _name(self) -> str:
        return f"best-fit-{self.seq_len}-{self._seed}-{self._draw:g}-{self._slack}{self._chosen}"

    def __getitem__(self, index: np.ndarray) -> Rows:
        """The rows with these indices [B], counted through all epochs."""
        epochs, within = np.divmod(np.asarray(index, np.int64), self.rows_per_epoch)
        if len(epochs) == 0 or epochs.min() != epochs.max():
            return lay(self.shard.tokens, [self.pieces(int(i)) for i in index], self.seq_len, self.pad)
        plan = self._epoch(int(epochs[0]))
        first_B, last_B = np.searchsorted(plan[:, 0], (within, within + 1))
        count_B = last_B - first_B
        place_M = np.arange(int(count_B.sum())) + np.repeat(first_B - (np.cumsum(count_B) - count_B), count_B)
        return lay_text(text_of(self.shard.tokens, _pieces(plan[place_M])), count_B, self.seq_len, self.pad)

    def first_epoch(self, index: np.ndarray) -> Rows:
        """Like `[]`, but rows after the end of epoch 0 are padding (segment 0 and weight 0 throughout)."""
        real = np.asarray(index) < self.rows_per_epoch
        pieces = [
            self.pieces(int(i)) if here else Pieces.none() for i, here in zip(np.asarray(index), real, strict=True)
        ]
        return lay(self.shard.tokens, pieces, self.seq_len, self.pad)

    def pieces(self, index: int) -> Pieces:
        """The pieces of a row, counted through all epochs, in their order."""
        epoch, row = divmod(index, self.rows_per_epoch)
        plan = self._epoch(epoch)
        first, last = np.searchsorted(plan[:, 0], (row, row + 1))
        return _pieces(plan[first:last])

    def _epoch(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._remember(f"{self._name()}-{epoch}", lambda: self._fitting(epoch))
                for old in sorted(self._plans)[:-2]:
                    if old != epoch:
                        del self._plans[old]
            return self._plans[epoch]

    def _fitting(self, epoch: int) -> np.ndarray:
        """A plan with `rows_per_epoch` rows: less and less is left to chance until it has no more."""
        for jitter in (0.1, 0.02, 0.0):
            plan = self._plan(epoch, jitter)
            if plan[-1, 0] < self.rows_per_epoch:
                return self._spread(plan, epoch)
        return self._spread(self._plan(None, 0.0), epoch)

    def _plan(self, epoch: int | None, jitter: float) -> np.ndarray:
        """Rows of (row, begin, end, stop of the document, whether drawn) in the order of the rows.

        Args:
            epoch: None for the reference, whose number of rows is that of every epoch.
            jitter: how far lengths may seem to differ from what they are when they are sorted, as a share.
        """
        random = np.random.default_rng([self._seed, 1, 0] if epoch is None else [self._seed, 2, epoch])
        offsets = np.asarray(self.shard.offsets)
        begins, stops = offsets[self._documents], offsets[self._documents + 1]
        size = self.seq_len - self._slack
        long = np.flatnonzero(stops - begins > self.seq_len)
        short_M = random.integers(0, 1 << 30, len(long)) if epoch is not None else np.zeros(len(long), np.int64)
        cuts = [
            cut_document(int(begins[d]), int(stops[d]), size, int(short), self._ends_line)
            for d, short in zip(long, short_M, strict=True)
        ]
        whole = np.ones(len(begins), bool)
        whole[long] = False
        begin_M = np.concatenate([begins[whole], *(cut[:-1] for cut in cuts)]).astype(np.int64)
        end_M = np.concatenate([stops[whole], *(cut[1:] for cut in cuts)]).astype(np.int64)
        stop_M = np.concatenate([stops[whole], np.repeat(stops[long], [len(cut) - 1 for cut in cuts])]).astype(np.int64)
        drawn_M = random.random(len(begin_M)) < self._draw
        drawn_M &= end_M - begin_M + self._slack <= self.seq_len
        size_M = end_M - begin_M + self._slack * drawn_M
        row_M = np.empty(len(begin_M), np.int64)
        order = _order(size_M, random, jitter)
        row_M[order], _ = best_fit(size_M[order], self.seq_len)
        within = np.lexsort((random.random(len(row_M)), row_M))
        return np.stack([row_M, begin_M, end_M, stop_M, drawn_M], axis=1)[within]

    def _ends_line(self, first: int, last: int) -> np.ndarray:
        if self._line_ends is None:
            return np.zeros(last - first, bool)
        return self._line_ends[self.shard.tokens[first:last]]

    def _spread(self, plan: np.ndarray, epoch: int) -> np.ndarray:
        """The plan with `rows_per_epoch` rows, in another order: rows of several pieces are split to fill up."""
        random = np.random.default_rng([self._seed, 3, epoch])
        rows = int(plan[-1, 0]) + 1
        plan = plan.copy()
        last_in_row = np.append(np.diff(plan[:, 0]) > 0, True)
        first_in_row = np.append(True, last_in_row[:-1])
        splittable = np.flatnonzero(last_in_row & ~first_in_row)[: self.rows_per_epoch - rows]
        plan[splittable, 0] = rows + np.arange(len(splittable))
        plan[:, 0] = random.permutation(self.rows_per_epoch)[plan[:, 0]]
        return plan[np.argsort(plan[:, 0], kind="stable")]


def _pieces(plan: np.ndarray) -> Pieces:
    return Pieces(plan[:, 1], plan[:, 2], plan[:, 3], plan[:, 4] > 0)


def _order(size_M: np.ndarray, random: np.random.Generator, jitter: float) -> np.ndarray:
    """The pieces, longest first within each window of a random order; equal ones in a random order."""
    order = random.permutation(len(size_M))
    seeming_M = size_M[order] * (1 + jitter * random.random(len(order)))
    parts = []
    for first in range(0, len(order), WINDOW):
        window = slice(first, first + WINDOW)
        parts.append(order[window][np.argsort(-seeming_M[window], kind="stable")])
    return np.concatenate(parts)
