"""A corpus, its mixture and the rows of any step, to look at: `jaxlm data inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.config import Config
from jaxlm.data.packing.pieces import Rows
from jaxlm.data.pipeline import Corpus, TrainBatches, make_train_iterator, prepare
from jaxlm.data.rows.build import row_tokens
from jaxlm.data.rows.compose import FilledRows
from jaxlm.errors import UserError

_COLOURS = ("cyan", "green", "yellow", "magenta", "blue")


@dataclasses.dataclass(frozen=True)
class ShownPiece:
    """One segment of a row: where its tokens are from.

    Attributes:
        name: of the document.
        begin, end: tokens of the document that it holds.
        filled: `PSM 12:40` or `SPM 12:40`, the characters of the piece that are the middle; empty when plain.
    """

    name: str
    begin: int
    end: int
    filled: str


@dataclasses.dataclass(frozen=True)
class ShownRow:
    """One row of the run.

    Attributes:
        number: of the row in the run.
        source: name of its corpus in a mixture.
        row: its number among the rows of that corpus.
    """

    number: int
    source: str
    row: int
    pieces: tuple[ShownPiece, ...]
    arrays: dict[str, list[Any]]

    @property
    def padding(self) -> int:
        """Places without a token."""
        return self.arrays["segments"].count(0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the arrays, the corpus, and where each segment is from."""
        pieces = [dataclasses.asdict(piece) for piece in self.pieces]
        return {"row": self.number, "source": self.source, "source_row": self.row, "pieces": pieces, **self.arrays}


@dataclasses.dataclass(frozen=True)
class ShownSource:
    """One corpus of a mixture: its size, and how much of it the run reads."""

    name: str
    tokens: int
    rows_per_epoch: int
    rows: int
    planned: float
    delivered: float

    @property
    def epochs(self) -> float:
        """Epochs at the end of the run."""
        return self.rows / self.rows_per_epoch


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jaxlm data inspect` shows."""

    corpus: Corpus
    seq_len: int
    rows_per_epoch: int
    document_tokens: dict[str, int]
    sources: tuple[ShownSource, ...]
    end: str
    rows: tuple[ShownRow, ...]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        sizes = ", ".join(f"{name} {value:,}" for name, value in self.document_tokens.items())
        lines: list[Any] = [self.corpus, f"tokens of a training document: {sizes}"]
        if self.sources:
            table = Table("corpus", "tokens", "rows an epoch", "epochs of the run", "share planned", "share delivered")
            for one in self.sources:
                shares = f"{one.planned:.4f}", f"{one.delivered:.4f}"
                table.add_row(one.name, f"{one.tokens:,}", f"{one.rows_per_epoch:,}", f"{one.epochs:.2f}", *shares)
            lines.append(table)
        else:
            lines.append(f"{self.rows_per_epoch:,} rows of {self.seq_len} tokens an epoch")
        if self.end:
            lines.append(self.end)
        return Group(*lines, *(_shown(row, self.corpus) for row in self.rows))


def _shown(row: ShownRow, corpus: Corpus) -> Any:
    from rich.text import Text

    of_source = f" of {row.source}" if row.source else ""
    out = Text(f"row {row.number:,}: row {row.row:,}{of_source}, {row.padding} of padding\n", style="bold")
    segments, tokens = np.array(row.arrays["segments"]), np.array(row.arrays["tokens"])
    for number, piece in enumerate(row.pieces, start=1):
        here = tokens[segments == number]
        filled = f", {piece.filled}" if piece.filled else ""
        where = f"{piece.name}, tokens {piece.begin:,} to {piece.end:,}"
        out.append(f"[segment {number}: {len(here)} tokens, {where}{filled}]\n", style="bold")
        out.append(corpus.tokenizer.decode(here.tolist()) + "\n", style=_COLOURS[number % len(_COLOURS)])
    return out


def inspect_corpus(config: Config, *, step: int = 1, rows: int = 1, corpus: Corpus | None = None) -> Report:
    """Prepare the corpora of a config, and describe them, their mixture, and the first rows of one step.

    Raises:
        UserError: the step lies beyond the run or the end of the mixture; or see `pipeline.prepare`.
    """
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: the run has the steps 1 to {config.train.steps}")
    corpus = corpus or prepare(config)
    batches = make_train_iterator(config.data, corpus, batch_size=config.train.batch_size, seed=config.seed)
    if step > batches.count:
        raise UserError(f"--step {step}: every corpus is through after {int(batches.count)} steps (max_epochs)")
    lengths = np.concatenate([np.diff(part.shards.train.offsets) for part in corpus.parts])
    quantiles = {"shortest": 0.0, "median": 0.5, "longest": 1.0}
    first = (step - 1) * config.train.batch_size
    end = f"every corpus is through after step {int(batches.count)}" if batches.count < config.train.steps else ""
    return Report(
        corpus=corpus,
        seq_len=config.data.seq_len,
        rows_per_epoch=batches.rows.sources[0].rows.rows_per_epoch,
        document_tokens={name: int(np.quantile(lengths, q)) for name, q in quantiles.items()},
        sources=_sources(config, batches),
        end=end,
        rows=tuple(_rows(batches, corpus, np.arange(first, first + min(rows, config.train.batch_size)))),
    )


def _sources(config: Config, batches: TrainBatches) -> tuple[ShownSource, ...]:
    mixture = batches.rows.mixture
    if mixture is None:
        return ()
    total = int(min(config.train.steps * config.train.batch_size, mixture.end))
    counts = mixture.counts(total)
    wanted = mixture.wanted(total)
    per_row = np.array([row_tokens(source.rows) for source in batches.rows.sources])
    planned, delivered = (rows * per_row / (rows * per_row).sum() for rows in (wanted, counts))
    return tuple(
        ShownSource(
            name=source.name,
            tokens=len(source.rows.shard.tokens),
            rows_per_epoch=source.rows.rows_per_epoch,
            rows=int(counts[i]),
            planned=float(planned[i]),
            delivered=float(delivered[i]),
        )
        for i, source in enumerate(batches.rows.sources)
    )


def _rows(batches: TrainBatches, corpus: Corpus, numbers: np.ndarray) -> Iterator[ShownRow]:
    arrays: Rows = batches.rows[numbers]
    source_B, row_B = batches.rows.place(numbers)
    for i, number in enumerate(numbers.tolist()):
        source = batches.rows.sources[int(source_B[i])]
        rows, shard = source.rows, source.rows.shard
        pieces = rows.pieces(int(row_B[i]))
        filled = [""] * len(pieces.begins)
        if isinstance(rows, FilledRows):
            filled = [
                " ".join(f"{'SPM' if one.spm else 'PSM'} {one.span[0]}:{one.span[1]}" for one in made.filled)
                for made in rows.made(int(row_B[i]))
            ]
        shown = []
        for begin, end, how in zip(pieces.begins.tolist(), pieces.ends.tolist(), filled, strict=True):
            document = shard.document_at(begin)
            start = int(shard.offsets[document])
            shown.append(ShownPiece(shard.name(document), begin - start, end - start, how))
        plain = {name: array[i].tolist() for name, array in arrays._asdict().items()}
        yield ShownRow(number, source.name, int(row_B[i]), tuple(shown), plain)
