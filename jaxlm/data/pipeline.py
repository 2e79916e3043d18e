"""From `[data]` and `[tokenizer]` to batches: the corpus prepared, and grain iterators over its packed rows.

Batch b of the run is rows `b * B` to `(b + 1) * B` of `PackedRows`; each process makes those that its devices hold.
The global batch does not depend on the number of processes, and the iterator's state is the number of the next batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlm.config import Config, Data
from jaxlm.config import Tokenizer as TokenizerConfig
from jaxlm.data.packing import PackedRows
from jaxlm.data.shards import Shard, Shards, exclusive, open_shards
from jaxlm.data.sources import Documents, describe_skipped, pieces
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer, check_fits

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
"""`tokens, targets, positions, segments` int32 and `weights` float32, each [B, T]; see `packing.Rows`."""

_SAMPLE_CHARS = 1 << 13
_VALIDATION_SEED = 0  # not the run's seed: runs that differ in it are judged on the same rows


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Figures of one side of the corpus. `tokens` count begin and end of each document, `text_bytes` do not."""

    documents: int
    tokens: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for one token; NaN when empty."""
        return self.text_bytes / self.tokens if self.tokens else math.nan


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus: all that a run needs of its data.

    Attributes:
        fingerprint: sha256 (hex) of all tokens; a run that resumes with another one does not see the same data.
        unigram_entropy: nats a token, the loss of a model that knows only how frequent each token is; NaN without
            validation tokens.
        skipped: name to reason of the files that were left out.
        reused: whether the shards were in the cache.
    """

    source: str
    tokenizer: Tokenizer
    train: Shard
    validation: Shard
    fingerprint: str
    unigram_entropy: float
    skipped: dict[str, str]
    folder: Path
    reused: bool

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Figures of `train` and `validation`."""
        sides = {"train": self.train, "validation": self.validation}
        return {side: Statistics(s.documents, len(s.tokens), s.text_bytes) for side, s in sides.items()}

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("", "documents", "tokens", "bytes", "bytes/token")
        for side, s in self.statistics.items():
            ratio = f"{s.bytes_per_token:.2f}" if s.tokens else "-"
            table.add_row(side, f"{s.documents:,}", f"{s.tokens:,}", f"{s.text_bytes:,}", ratio)
        lines = [f"{self.tokenizer.vocab_size:,} token ids; {'reused' if self.reused else 'written to'} {self.folder}"]
        if not math.isnan(self.unigram_entropy):
            lines.append(f"unigram baseline {self.unigram_entropy:.4f} nats/token on validation")
        if self.skipped:
            lines.append(describe_skipped(self.skipped))
        return Group(Text(f"corpus {self.source}", style="bold"), table, Text("\n".join(lines)))


@dataclasses.dataclass(frozen=True)
class Report:
    """What `jaxlm data inspect` shows: a corpus, its rows and the beginning of one."""

    corpus: Corpus
    seq_len: int
    rows_per_epoch: int
    document_tokens: dict[str, int]
    row: Batch

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        sizes = ", ".join(f"{name} {value:,}" for name, value in self.document_tokens.items())
        first = {name: array[0] for name, array in self.row.items()}
        shown = Text()
        for segment in range(1, int(first["segments"].max()) + 1):
            ids = first["tokens"][first["segments"] == segment]
            shown.append(f"[segment {segment}, {len(ids)} tokens]\n", style="bold")
            shown.append(self.corpus.tokenizer.decode(ids.tolist()) + "\n")
        return Group(
            self.corpus,
            f"tokens of a training document: {sizes}",
            f"{self.rows_per_epoch:,} rows of {self.seq_len} tokens an epoch; the first row:",
            shown,
        )


def prepare(config: Config, tokenizer: Tokenizer | None = None) -> Corpus:
    """Make or reuse the tokenizer and the shards of a run; a run that resumes passes its own `tokenizer`.

    Raises:
        UserError: the corpus or the tokenizer is missing, bad or empty, the tokenizer does not fit `model.vocab_size`,
            or the disk is full.
    """
    documents = Documents(config.data)
    tokenizer = tokenizer or _make_tokenizer(config, documents)
    if config.model.vocab_size:
        check_fits(tokenizer, config.model.vocab_size)
    shards = open_shards(documents, tokenizer, config.data.cache_dir, config.data.workers)
    if shards.skipped and not shards.reused and config.data.source != "stdlib":
        print(f"{config.data.source}: {describe_skipped(shards.skipped)}", file=sys.stderr)
    return _corpus(config, tokenizer, shards)


def train_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that `[tokenizer]` describes, trained on the training documents if it is of kind `bpe`."""
    return _make_tokenizer(config, Documents(config.data))


def inspect_corpus(config: Config) -> Report:
    """Prepare a corpus and describe it."""
    corpus = prepare(config)
    rows = PackedRows(corpus.train, config.data.seq_len, seed=config.seed, pad=corpus.tokenizer.pad)
    lengths = np.diff(corpus.train.offsets)
    quantiles = {"shortest": 0.0, "median": 0.5, "longest": 1.0}
    return Report(
        corpus=corpus,
        seq_len=config.data.seq_len,
        rows_per_epoch=rows.rows_per_epoch,
        document_tokens={name: int(np.quantile(lengths, q)) for name, q in quantiles.items()},
        row=rows[np.arange(1)]._asdict(),
    )


def make_train_iterator(
    data: Data,
    corpus: Corpus,
    *,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over these `rows` (of 0 to B - 1; None: all) of each batch, made ahead by a thread.

    Its `get_state()` is a small dict for JSON; `set_state()` continues with the very next batch.
    """
    import grain

    packed = PackedRows(corpus.train, data.seq_len, seed=seed, pad=corpus.tokenizer.pad)
    share = np.arange(batch_size) if rows is None else rows
    batches = grain.MapDataset.source(_Batches(packed, batch_size, share))
    # One thread keeps the order of work simple and is far faster than a step; more would only contend for the lock.
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=data.prefetch)))


def make_validation_batches(
    data: Data,
    corpus: Corpus,
    *,
    batch_size: int,
    max_batches: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """These `rows` of the held-out batches: each token once, always in the same order, the last batch padded.

    `max_batches` (0: all) takes the first ones, a fair sample: the rows are shuffled once, with a fixed seed.
    """
    packed = PackedRows(corpus.validation, data.seq_len, seed=_VALIDATION_SEED, pad=corpus.tokenizer.pad)
    share = np.arange(batch_size) if rows is None else rows
    count = -(-packed.rows_per_epoch // batch_size)
    for batch in range(min(count, max_batches or count)):
        yield packed.first_epoch(batch * batch_size + share)._asdict()


class _Batches:
    """The rows of one process of all batches, as a source that grain reads at random."""

    def __init__(self, rows: PackedRows, batch_size: int, share: np.ndarray) -> None:
        self._rows, self._batch_size, self._share = rows, batch_size, share

    def __len__(self) -> int:
        return 2**62 // self._batch_size  # endless: the row index stays within int64

    def __getitem__(self, index: Any) -> Any:  # the types of grain's RandomAccessDataSource
        return self._rows[int(index) * self._batch_size + self._share]._asdict()

    def __repr__(self) -> str:
        return "PackedRows"


def _corpus(config: Config, tokenizer: Tokenizer, shards: Shards) -> Corpus:
    return Corpus(
        source=config.data.source,
        tokenizer=tokenizer,
        train=shards.train,
        validation=shards.validation,
        fingerprint=shards.fingerprint,
        unigram_entropy=shards.unigram_entropy,
        skipped=shards.skipped,
        folder=shards.folder,
        reused=shards.reused,
    )


def _make_tokenizer(config: Config, documents: Documents) -> Tokenizer:
    options = config.tokenizer
    if options.kind == "bytes":
        return Tokenizer.bytes_level(specials=options.specials)
    if options.kind == "file":
        if not options.path:
            raise UserError("tokenizer.kind = 'file' needs tokenizer.path", "name a tokenizer.json")
        return Tokenizer.from_file(options.path)
    return _trained(options, documents, Path(config.data.cache_dir))


def _trained(options: TokenizerConfig, documents: Documents, cache_dir: Path) -> Tokenizer:
    recipe = f"{documents.identity()} {options.vocab_size} {options.specials} {options.train_bytes}"
    path = cache_dir / f"tokenizer-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.json"
    if tokenizer := _cached(path):
        return tokenizer
    with exclusive(path):
        if not (tokenizer := _cached(path)):
            sample = _sample(documents, options.train_bytes)
            tokenizer = Tokenizer.train(sample, options.vocab_size, specials=options.specials)
            tokenizer.save(path)
        return tokenizer


def _cached(path: Path) -> Tokenizer | None:
    try:
        return Tokenizer.from_file(path)
    except UserError:  # absent or damaged
        return None


def _sample(documents: Documents, wanted: int) -> list[str]:
    """About `wanted` bytes of training text in short pieces, spread evenly over the corpus, in one pass."""
    kept: list[str] = []
    size, stride, seen = 0, 1, 0
    for side, document in documents:
        if side != "train":
            continue
        for piece in pieces(document.text, _SAMPLE_CHARS):
            if seen % stride == 0:
                kept.append(piece)
                size += len(piece.encode())
            seen += 1
            if size > 4 * wanted:
                kept, stride = kept[::2], 2 * stride
                size = sum(len(piece.encode()) for piece in kept)
    if size <= wanted:
        return kept
    picks = max(1, len(kept) * wanted // size)
    return [kept[i * len(kept) // picks] for i in range(picks)]
