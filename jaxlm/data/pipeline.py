"""From `[data]` and `[tokenizer]` to batches: the corpora prepared, and grain iterators over their rows.

Batch b of the run is rows `b * B` to `(b + 1) * B` of `rows.RunRows`; each process makes those that its devices hold.
The global batch does not depend on the number of processes, and the iterator's state is the number of the next batch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Config, Data
from jaxlm.config import Tokenizer as TokenizerConfig
from jaxlm.data.fim import SLACK
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.rows.build import run_rows
from jaxlm.data.rows.compose import FilledRows, RunRows
from jaxlm.data.rows.copies import copies, of_copies
from jaxlm.data.shards import Part, Shard, Shards, joined, open_shards
from jaxlm.data.sources import Documents, describe_skipped, pieces
from jaxlm.errors import UserError
from jaxlm.processes.file_lock import exclusive
from jaxlm.processes.orbax_silence import OrbaxSilence
from jaxlm.text.tokenizer import Tokenizer, check_fits

Batch = dict[str, np.ndarray]
"""`tokens, targets, positions, segments` int32 and `weights` float32, each [B, T]; see `packing.Rows`."""

_log = logging.getLogger(__name__)
_SAMPLE_CHARS = 1 << 13
_COPIED = 0.01  # of the validation tokens: a tiny file or two that everybody has change no figure
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
        parts: the corpora of a mixture, or the only one.
        fingerprint: sha256 (hex) of all tokens; a run does not resume with another one.
        unigram_entropy: nats a token, the loss of a model that knows only how frequent each token is; NaN without
            validation tokens.
        skipped: name to reason of the files that were left out.
        reused: whether the shards were in the cache.
    """

    source: str
    tokenizer: Tokenizer
    parts: tuple[Part, ...]
    fingerprint: str
    unigram_entropy: float
    skipped: dict[str, str]
    folder: Path
    reused: bool

    @functools.cached_property
    def train(self) -> Shard:
        """The training side; of a mixture, a copy of all of it in memory."""
        return joined([part.shards.train for part in self.parts])

    @functools.cached_property
    def validation(self) -> Shard:
        """The validation side; of a mixture, a copy of all of it in memory."""
        return joined([part.shards.validation for part in self.parts])

    @property
    def statistics(self) -> dict[str, Statistics]:
        """Figures of `train` and `validation`."""
        sides = {side: [getattr(part.shards, side) for part in self.parts] for side in ("train", "validation")}
        return {side: statistics(shards) for side, shards in sides.items()}

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


def statistics(shards: Sequence[Shard]) -> Statistics:
    """Figures of several shards together."""
    counts = [(shard.documents, len(shard.tokens), shard.text_bytes) for shard in shards]
    return Statistics(*(sum(column) for column in zip(*counts, strict=True)))


def prepare(config: Config, tokenizer: Tokenizer | None = None) -> Corpus:
    """Make or reuse the tokenizer and the shards of a run; a run that resumes passes its own `tokenizer`.

    Raises:
        UserError: the corpus or the tokenizer is missing, bad or empty, the tokenizer does not fit `model.vocab_size`,
            or the disk is full.
    """
    corpora = corpora_of(config.data)
    tokenizer = tokenizer or _make_tokenizer(config, corpora)
    if tokenizer.eot is None and config.tokenizer.kind == "file":
        hint = "no document ends, nor does a generation; eos_token in a tokenizer_config.json beside it names one"
        _log.warning("warning: %s: no end-of-text token: %s", config.tokenizer.path, hint)
    if config.model.vocab_size:
        check_fits(tokenizer, config.model.vocab_size)
    data = config.data
    row_limit = data.seq_len - (4 * SLACK if data.fim.rate else 0)
    with_names = bool(data.languages or data.mixture or data.fim.rate or config.eval.by_language)
    open_one = functools.partial(open_shards, row_limit=row_limit, with_names=with_names)
    parts = []
    for name, documents in corpora:
        shards = open_one(documents, tokenizer, data.cache_dir, data.workers)
        if shards.skipped and not shards.reused and "stdlib" not in documents.where:
            _log.warning("%s: %s", ", ".join(documents.where), describe_skipped(shards.skipped))
        if not shards.train.trained_tokens:
            message = f"data.source = {', '.join(documents.where)!r}: every document has one token, so none is a target"
            raise UserError(
                message, "nothing can be learned from it: take longer texts, or a tokenizer with an end of text"
            )
        parts.append(Part(name, shards))
    for part, (_, documents) in zip(parts, corpora, strict=True):
        for line in _doubts(part.shards, [other.shards.train for other in parts]):
            _log.warning("warning: %s: %s", ", ".join(documents.where), line)
    return _corpus(tokenizer, parts, [", ".join(documents.where) for _, documents in corpora])


def train_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that `[tokenizer]` describes, trained on the training documents if it is of kind `bpe`.

    Of a mixture, each corpus gives as much text as its first weight says.
    """
    return _make_tokenizer(config, corpora_of(config.data))


def make_train_iterator(
    data: Data,
    corpus: Corpus,
    *,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
) -> TrainBatches:
    """An endless iterator over these `rows` (of 0 to B - 1; None: all) of each batch, made ahead by a thread.

    Its `get_state()` is a small dict for JSON; `set_state()` continues with the very next batch.
    """
    return TrainBatches(data, corpus, batch_size, seed, np.arange(batch_size) if rows is None else rows)


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
    return validation_batches(packed, batch_size=batch_size, max_batches=max_batches, rows=rows)


def validation_batches(
    packed: PackedRows | FilledRows, *, batch_size: int, max_batches: int = 0, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """These `rows` of the batches of one epoch of packed rows; see `make_validation_batches`."""
    share = np.arange(batch_size) if rows is None else rows
    count = -(-packed.rows_per_epoch // batch_size)
    for batch in range(min(count, max_batches or count)):
        yield packed.first_epoch(batch * batch_size + share)._asdict()


class TrainBatches:
    """The batches of a run. Its state is the number of the next batch, and the shares of a mixture up to it.

    Attributes:
        count: batches until every corpus of a mixture has been read as often as it may be; infinite otherwise.
    """

    def __init__(self, data: Data, corpus: Corpus, batch_size: int, seed: int, share: np.ndarray) -> None:
        self._data, self._corpus, self._batch_size, self._seed, self._share = data, corpus, batch_size, seed, share
        self._delivered = np.zeros(len(corpus.parts))
        self._open([])

    def _open(self, history: Sequence[Any]) -> None:
        with OrbaxSilence():  # grain imports Orbax
            import grain

        parts, tokenizer = self._corpus.parts, self._corpus.tokenizer
        self.rows, self._history = run_rows(
            self._data, parts, tokenizer, batch_size=self._batch_size, seed=self._seed, history=history
        )
        end = self.rows.mixture.end if self.rows.mixture else math.inf
        self.count = end if math.isinf(end) else int(end) // self._batch_size
        batches = grain.MapDataset.source(_Batches(self.rows, self._batch_size, self._share))
        # One thread keeps the order of work simple and is far faster than a step; more would contend for a lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._data.prefetch)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        source_B = batch.pop("source", None)
        if source_B is not None:
            tokens_B = batch["weights"].sum(axis=1, dtype=np.float64)
            self._delivered += np.bincount(source_B, weights=tokens_B, minlength=len(self._delivered))
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and for a mixture the shares up to it."""
        return {**self._iterator.get_state(), **({"mixture": self._history} if self._history else {})}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the batch of a state. Shares that were changed since hold from there on."""
        own = {key: value for key, value in state.items() if key != "mixture"}
        history = [tuple(entry) for entry in state.get("mixture", [])]
        if history:
            wanted = self._history[-1][1]
            if json.loads(json.dumps(wanted)) != json.loads(json.dumps(history[-1][1])):
                history.append((own["next_index"] * self._batch_size, wanted))
            self._open(history)
        self._iterator.set_state(own)

    def delivered(self) -> dict[str, float]:
        """Tokens that carry loss by corpus, in this process since the last call; empty without a mixture."""
        if not self.rows.mixture:
            return {}
        tokens, self._delivered = self._delivered, np.zeros_like(self._delivered)
        return {part.name: float(count) for part, count in zip(self._corpus.parts, tokens, strict=True)}


class _Batches:
    """The rows of one process of all batches, as a source that grain reads at random."""

    def __init__(self, rows: RunRows, batch_size: int, share: np.ndarray) -> None:
        self._rows, self._batch_size, self._share = rows, batch_size, share

    def __len__(self) -> int:
        return 2**62 // self._batch_size  # endless: the row index stays within int64

    def __getitem__(self, index: Any) -> Any:  # the types of grain's RandomAccessDataSource
        numbers = int(index) * self._batch_size + self._share
        mixture = self._rows.mixture
        if mixture is None:
            return self._rows[numbers]._asdict()
        numbers = np.minimum(numbers, int(min(mixture.end, 2**62)) - 1)  # read ahead beyond the end, and never used
        return {**self._rows[numbers]._asdict(), "source": self._rows.place(numbers)[0]}

    def __repr__(self) -> str:
        return "RunRows"


def corpora_of(data: Data) -> list[tuple[str, Documents]]:
    """The corpora of a mixture by name; without one, the only corpus, under the empty name."""
    if not data.mixture:
        return [("", Documents(data))]
    plain = dataclasses.replace(data, mixture=(), stop_with="", curriculum=dataclasses.replace(data.curriculum))
    return [
        (
            one.name,
            Documents(
                dataclasses.replace(
                    plain,
                    source=one.source,
                    languages=one.languages,
                    extensions=one.extensions or data.extensions,
                    text_key=one.text_key or data.text_key,
                )
            ),
        )
        for one in data.mixture
    ]


def _corpus(tokenizer: Tokenizer, parts: Sequence[Part], names: Sequence[str]) -> Corpus:
    """Of a mixture, the unigram baseline knows from which corpus a token is."""
    shards = [part.shards for part in parts]
    fingerprint, entropy = shards[0].fingerprint, shards[0].unigram_entropy
    if parts[0].name:
        marked = "".join(f"{part.name} {part.shards.fingerprint} " for part in parts)
        fingerprint = hashlib.sha256(marked.encode()).hexdigest()
        counts = np.array([len(one.validation.tokens) for one in shards])
        entropies = np.array([one.unigram_entropy for one in shards])
        entropy = float(np.average(entropies[counts > 0], weights=counts[counts > 0])) if counts.any() else math.nan
    return Corpus(
        source="; ".join(names),
        tokenizer=tokenizer,
        parts=tuple(parts),
        fingerprint=fingerprint,
        unigram_entropy=entropy,
        skipped={name: reason for one in shards for name, reason in one.skipped.items()},
        folder=shards[0].folder,
        reused=all(one.reused for one in shards),
    )


def _make_tokenizer(config: Config, corpora: Sequence[tuple[str, Documents]]) -> Tokenizer:
    options = config.tokenizer
    if options.kind == "bytes":
        return Tokenizer.bytes_level(specials=options.specials)
    if options.kind == "file":
        if not options.path:
            raise UserError("tokenizer.kind = 'file' needs tokenizer.path", "name a tokenizer.json")
        read = Tokenizer.from_file(options.path)
        return read.with_fim_marks() if options.fim_marks else read
    weights = [one.weight_at(0) for one in config.data.mixture] or [1.0]
    return _trained(options, [documents for _, documents in corpora], weights, Path(config.data.cache_dir))


def _trained(
    options: TokenizerConfig, corpora: Sequence[Documents], weights: Sequence[float], cache_dir: Path
) -> Tokenizer:
    recipe = f"{corpora[0].identity()} {options.vocab_size} {options.specials} {options.train_bytes}"
    if len(corpora) > 1:
        recipe += "".join(
            f" {documents.identity()} {weight}" for documents, weight in zip(corpora, weights, strict=True)
        )
    path = cache_dir / f"tokenizer-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}.json"
    if tokenizer := _cached(path):
        return tokenizer
    with exclusive(path):
        if not (tokenizer := _cached(path)):
            shares = [round(options.train_bytes * weight / sum(weights)) for weight in weights]
            samples = [_sample(one, share) for one, share in zip(corpora, shares, strict=True) if share]
            sample = [piece for pieces_of_one in samples for piece in pieces_of_one]
            tokenizer = Tokenizer.train(sample, options.vocab_size, specials=options.specials)
            tokenizer.save(path)
        return tokenizer


def _doubts(shards: Shards, trained: Sequence[Shard]) -> Iterator[str]:
    """Why the validation loss of a corpus may look better than it is; `trained` is all that the run trains on."""
    count, share = copies(trained, shards.validation)
    if share >= _COPIED:
        yield of_copies(count, shards.validation.documents, "documents", f", {share:.0%} of their tokens,")
    if shards.lossy and shards.lossy[0]:
        yield (
            f"the tokenizer does not give back {shards.lossy[0]} of {shards.lossy[1]} texts as they were: bits/byte "
            "divide the loss on what the ids hold by the bytes of the whole text"
        )


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
