"""The rows of a run: packing, fill-in-the-middle, curriculum and mixture, each a function of a row's number.

    row n of the run --mixture--> draw k of a source --curriculum--> its row r --packing--> pieces --fim--> ids

`RunRows` is that line. Whoever asks for row n gets the same row, whatever was asked for before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from jaxlm.data.curriculum import Curriculum
from jaxlm.data.fim import SLACK, Filled, FillIn, Spans
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing.pieces import Pieces, Rows, Text, lay_text
from jaxlm.data.shards import Shard


@runtime_checkable
class SourceRows(Protocol):
    """The endless sequence of rows of one source."""

    shard: Shard
    seq_len: int
    rows_per_epoch: int
    pad: int

    def __getitem__(self, index: np.ndarray) -> Rows: ...
    def pieces(self, index: int) -> Pieces: ...


@dataclasses.dataclass(frozen=True)
class Made:
    """One piece of a row as it is in the row.

    Attributes:
        tokens: its ids.
        after: the next id of its document; -1 where there is none.
        learned: whether the target of each id is learned.
        begin: where it begins in the shard.
        filled: how it was transformed, once for each file of a repository; empty when it was not.
    """

    tokens: np.ndarray
    after: int
    learned: np.ndarray
    begin: int
    filled: tuple[Filled, ...] = ()


class FilledRows:
    """Rows of which the drawn pieces are turned into fill-in-the-middle, by a generator of (seed, epoch, row, piece).

    Args:
        rows: packed with room for `slack` more tokens in each drawn piece.
        spans_of: how to choose a middle in a piece that begins at this place of the shard.
        middles_only: learn nothing but middles, and the end of text after them.
        whole_only: transform no piece that is a part of a document.
        separator: id that begins each file of a repository; None: documents have no files.
        file_rate: share of the files of a drawn repository that are transformed.
    """

    def __init__(
        self,
        rows: SourceRows,
        fill_in: FillIn,
        spans_of: Callable[[int], Spans],
        *,
        seed: int,
        slack: int = SLACK,
        begin_of_text: int | None = None,
        middles_only: bool = False,
        whole_only: bool = False,
        separator: int | None = None,
        file_rate: float = 0.5,
    ) -> None:
        self.shard, self.seq_len, self.rows_per_epoch, self.pad = (
            rows.shard,
            rows.seq_len,
            rows.rows_per_epoch,
            rows.pad,
        )
        self._rows, self._fill_in, self._spans_of, self._seed = rows, fill_in, spans_of, seed
        self._bos, self._separator, self._file_rate = begin_of_text, separator, file_rate
        self._middles_only, self._whole_only, self._slack = middles_only, whole_only, slack

    def __getitem__(self, index: np.ndarray) -> Rows:
        """The rows with these indices [B], counted through all epochs."""
        return self._lay([self.made(int(i)) for i in np.asarray(index)])

    def first_epoch(self, index: np.ndarray) -> Rows:
        """Like `[]`, but rows after the end of epoch 0 are padding (segment 0 and weight 0 throughout)."""
        return self._lay([self.made(int(i)) if i < self.rows_per_epoch else [] for i in np.asarray(index)])

    def pieces(self, index: int) -> Pieces:
        """The pieces of a row before they are transformed."""
        return self._rows.pieces(index)

    def made(self, index: int) -> list[Made]:
        """The pieces of a row as they are in it."""
        epoch, row = divmod(index, self.rows_per_epoch)
        pieces = self._rows.pieces(index)
        free = self.seq_len - int((pieces.ends - pieces.begins).sum())
        waiting = int(pieces.drawn.sum())
        out = []
        for number, (begin, end, stop, drawn) in enumerate(zip(*(part.tolist() for part in pieces), strict=True)):
            tokens = np.asarray(self.shard.tokens[begin:end], np.int64)
            made = None
            if drawn:
                waiting -= 1
                random = np.random.default_rng([self._seed, epoch, row, number])
                made = self._transform(tokens, begin, end == stop, random, free - waiting * self._slack)
            if made is None:
                after = int(self.shard.tokens[end]) if end < stop else -1
                made = Made(tokens, after, np.full(len(tokens), not self._middles_only), begin)
            free -= len(made.tokens) - len(tokens)
            out.append(made)
        return out

    def _transform(
        self, tokens: np.ndarray, begin: int, ends: bool, random: np.random.Generator, growth: int
    ) -> Made | None:
        """The piece transformed, at most `growth` ids longer; None when it has nothing to choose or no room."""
        document = int(np.searchsorted(self.shard.offsets, begin, side="right")) - 1
        starts = int(self.shard.offsets[document]) == begin
        if self._whole_only and not (starts and ends):
            return None
        spans = self._spans_of(begin)
        if self._separator is not None and np.any(tokens == self._separator):
            return self._transform_files(tokens, begin, ends, random, growth, spans)
        head = tokens[:1] if len(tokens) and tokens[0] == self._bos else tokens[:0]
        body = (
            tokens[len(head) : len(tokens) - 1]
            if ends and tokens[-1] == self._fill_in.marks.end
            else tokens[len(head) :]
        )
        filled = self._fill_in.fill_in(body, random, spans, len(tokens) - len(head) + growth, starts=starts)
        if filled is None:
            return None
        learned = np.full(len(head) + len(filled.tokens), not self._middles_only)
        if self._middles_only:
            learned[len(head) + filled.answer - 1 :] = True
        return Made(np.concatenate([head, filled.tokens]), -1, learned, begin, (filled,))

    def _transform_files(
        self, tokens: np.ndarray, begin: int, ends: bool, random: np.random.Generator, growth: int, spans: Spans
    ) -> Made | None:
        """A piece of a repository: each of its files is transformed with `file_rate`, behind its path."""
        cuts = [0, *np.flatnonzero(tokens == self._separator).tolist(), len(tokens)]
        parts, learned, done = [], [], []
        for first, last in itertools.pairwise(cuts):
            file = tokens[first:last]
            wanted = random.random() < self._file_rate
            path = self._path(file)
            body = file[path:]
            closed = ends and last == len(tokens) and len(body) > 0 and body[-1] == self._fill_in.marks.end
            filled = None
            if wanted and path:
                core = body[:-1] if closed else body
                filled = self._fill_in.fill_in(core, random, spans, len(body) + growth, starts=False)
            if filled is None:
                parts.append(file)
                learned.append(np.full(len(file), not self._middles_only))
                continue
            growth -= path + len(filled.tokens) - len(file)
            done.append(filled)
            parts.append(np.concatenate([file[:path], filled.tokens]))
            marked = np.full(path + len(filled.tokens), not self._middles_only)
            if self._middles_only:
                marked[path + filled.answer - 1 : -1] = True
            learned.append(marked)
        if not done:
            return None
        # A file's end of text tells nothing of the file behind it.
        flat, mask = np.concatenate(parts), np.concatenate(learned)
        mask[flat == self._fill_in.marks.end] = False
        return Made(flat, -1, mask, begin, tuple(done))

    def _path(self, file: np.ndarray) -> int:
        """Ids of the separator and the path of a file, up to the first line end; 0 when there is none."""
        if not len(file) or file[0] != self._separator:
            return 0
        for count in range(2, min(len(file), 64)):
            if "\n" in self._fill_in.text(file[1:count]):
                return count
        return 0

    def _lay(self, rows: Sequence[Sequence[Made]]) -> Rows:
        made = [piece for row in rows for piece in row]
        nothing = np.zeros(0, np.int64)
        text = Text(
            np.concatenate([nothing, *(piece.tokens for piece in made)]),
            np.array([len(piece.tokens) for piece in made], np.int64),
            np.array([piece.after for piece in made], np.int64),
            np.concatenate([nothing > 0, *(piece.learned for piece in made)]),
        )
        return lay_text(text, np.array([len(row) for row in rows]), self.seq_len, self.pad)


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a run: its rows and the order in which they are drawn."""

    name: str
    rows: SourceRows
    curriculum: Curriculum | None = None

    def index(self, draws: np.ndarray) -> np.ndarray:
        """The row of each draw, counted through all epochs."""
        return draws if self.curriculum is None else self.curriculum[draws]


class RunRows:
    """All rows of a run. `mixture` None: there is one source."""

    def __init__(self, sources: Sequence[Source], mixture: Mixture | None = None) -> None:
        self.sources, self.mixture = tuple(sources), mixture

    def place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source [B] of these rows [B] of the run, and the row of that source."""
        numbers = np.asarray(numbers, np.int64)
        source_B, draw_B = (np.zeros_like(numbers), numbers) if self.mixture is None else self.mixture[numbers]
        row_B = np.empty_like(numbers)
        for i, source in enumerate(self.sources):
            row_B[source_B == i] = source.index(draw_B[source_B == i])
        return source_B, row_B

    def __getitem__(self, numbers: np.ndarray) -> Rows:
        """These rows [B] of the run."""
        source_B, row_B = self.place(numbers)
        if len(self.sources) == 1:
            return self.sources[0].rows[row_B]
        out: Rows | None = None
        for i, source in enumerate(self.sources):
            here = np.flatnonzero(source_B == i)
            if not len(here):
                continue
            part = source.rows[row_B[here]]
            out = out or Rows(*(np.empty((len(source_B), *array.shape[1:]), array.dtype) for array in part))
            for whole, array in zip(out, part, strict=True):
                whole[here] = array
        if out is None:
            raise IndexError("no row was asked for")
        return out
