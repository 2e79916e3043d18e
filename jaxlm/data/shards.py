"""The tokenised corpus on disk: made once, in parallel, and memory-mapped from then on.

    CACHE/FINGERPRINT/meta.json                       what it is and how large each file must be
    CACHE/FINGERPRINT/{train,validation}/tokens.bin   uint16 or uint32 ids, one document after the other
    CACHE/FINGERPRINT/{train,validation}/offsets.npy  int64 [documents + 1], where each document begins
    CACHE/FINGERPRINT/{train,validation}/names.txt    a line a document: its name and its language
    CACHE/FINGERPRINT/{train,validation}/values.npy   float64 [documents], where a curriculum goes by a field

Every document begins with begin-of-text when the `tokenizer.json` puts one before a text, as Llama was trained, and
ends with end-of-text when the tokenizer has one. The folder is built under another name, synced and
renamed, under a lock: it is whole or absent, and of several processes one builds it while the others wait.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import numpy as np

from jaxlm.data import repository
from jaxlm.data.readers import Document
from jaxlm.data.rows.progress_in_bytes import Progress
from jaxlm.data.rows.round_trip import RoundTrip
from jaxlm.data.sources import Documents, Side, separable
from jaxlm.errors import UserError
from jaxlm.processes.file_lock import exclusive
from jaxlm.text.tokenizer import Tokenizer

FORMAT = 1
PIECE_CHARS = 1 << 18
"""Longer documents are tokenised in parts of this length, so that one large file is parallel too."""

SIDES: tuple[Side, ...] = get_args(Side)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One side of the corpus: document i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: uint16 or uint32 [N], memory-mapped.
        offsets: int64 [documents + 1], memory-mapped.
        text_bytes: UTF-8 bytes of the documents' texts.
        folder: where it lies; None when it is in memory alone.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: int
    folder: Path | None = None

    @property
    def documents(self) -> int:
        """How many documents."""
        return len(self.offsets) - 1

    @property
    def trained_tokens(self) -> int:
        """Tokens that are the target of another one: all but the first of each document."""
        return len(self.tokens) - int(np.count_nonzero(np.diff(self.offsets)))

    @functools.cached_property
    def names(self) -> list[str]:
        """Name and language of each document, as `NAME<tab>LANGUAGE`; empty for shards written before names were."""
        path = self.folder / "names.txt" if self.folder else None
        return path.read_text(encoding="utf-8").split("\n")[:-1] if path and path.is_file() else []

    @property
    def values(self) -> np.ndarray | None:
        """The number that each document has in the field of a curriculum; None when it was read without one."""
        path = self.folder / "values.npy" if self.folder else None
        return np.load(path, allow_pickle=False) if path and path.is_file() else None

    def name(self, document: int) -> str:
        """Name of a document."""
        return self.names[document].rpartition("\t")[0] if self.names else f"document {document}"

    def language(self, document: int) -> str:
        """Language of a document; empty where it is not known."""
        return self.names[document].rpartition("\t")[2] if self.names else ""

    def document_at(self, place: int) -> int:
        """The document that holds this token."""
        return int(np.searchsorted(self.offsets, place, side="right")) - 1


@dataclasses.dataclass(frozen=True)
class Shards:
    """Both sides, opened.

    Attributes:
        fingerprint: sha256 (hex) of all tokens and offsets: equal exactly when the data is.
        unigram_entropy: cross-entropy in nats a token of the validation tokens under the frequencies of the training
            tokens, counted from one (add-one smoothing). What a model that ignores its context reaches; NaN without
            validation tokens.
        skipped: name to reason of the files that were left out.
        reused: whether they were on disk already.
        lossy: of the documents that were decoded again, those whose text does not come back, and how many they were.
    """

    folder: Path
    train: Shard
    validation: Shard
    fingerprint: str
    unigram_entropy: float
    skipped: dict[str, str]
    reused: bool
    lossy: Sequence[int] = ()


def joined(shards: Sequence[Shard]) -> Shard:
    """Several shards as one, in memory; one alone as it is."""
    if len(shards) == 1:
        return shards[0]
    starts = np.cumsum([0, *(len(shard.tokens) for shard in shards[:-1])])
    offsets = [np.asarray(shard.offsets[:-1]) + start for shard, start in zip(shards, starts, strict=True)]
    tokens = np.concatenate([shard.tokens for shard in shards])
    return Shard(tokens, np.append(np.concatenate(offsets), len(tokens)), sum(shard.text_bytes for shard in shards))


class Part(NamedTuple):
    """One corpus of a run; its name is empty when it is the only one."""

    name: str
    shards: Shards


def open_shards(
    documents: Documents,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    workers: int = 0,
    *,
    row_limit: int = 0,
    with_names: bool = False,
) -> Shards:
    """Shards of this corpus and tokenizer, from the cache or built now by `workers` threads (0: one a core).

    The `tokenizers` library works outside the interpreter lock: threads are as parallel as processes and start at once.

    Args:
        row_limit: most tokens of a document that is a part of a repository.
        with_names: build shards again that were written before documents had names.

    Raises:
        UserError: the disk is full or not writable, or the corpus is bad (see `Documents`).
    """
    identity = f"{FORMAT} {documents.identity()} {tokenizer.fingerprint()}"
    if tokenizer.bos is not None or not tokenizer.cuts_at_lines:  # earlier shards have no begin, and more spaces
        identity += " 2"
    if documents.size > PIECE_CHARS:  # earlier shards of long documents may be cut where ids change
        identity += " cuts"
    if documents.marked:
        identity += f" {row_limit}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    folder = Path(cache_dir) / key
    if (shards := _read(folder, reused=True)) and (shards.train.names or not with_names):
        return shards
    with exclusive(folder):
        shards = _read(folder, reused=True)
        if shards and (shards.train.names or not with_names):  # another process built it while this one waited
            return shards
        unfinished = folder.with_suffix(".tmp")
        shutil.rmtree(
            unfinished, ignore_errors=True
        )  # of a process that was killed: the lock says that none is at work
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        try:
            _build(unfinished, documents, tokenizer, workers or os.cpu_count() or 1, row_limit)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        if not (shards := _read(folder, reused=False)):
            raise UserError(f"{folder}: damaged as soon as written", "check the disk, or change data.cache_dir")
        return shards


def _build(folder: Path, documents: Documents, tokenizer: Tokenizer, workers: int, row_limit: int) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    begin, end = ([] if token is None else [token] for token in (tokenizer.bos, tokenizer.eot))
    piece_chars = PIECE_CHARS if tokenizer.cuts_at_lines else sys.maxsize
    round_trip = RoundTrip(tokenizer)
    with contextlib.ExitStack() as stack:
        writers: dict[Side, _Writer] = {
            side: stack.enter_context(_Writer(folder / side, dtype, tokenizer.vocab_size)) for side in SIDES
        }
        progress = stack.enter_context(Progress("tokenising", documents.size))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        stack.callback(pool.shutdown, cancel_futures=True)
        pending: deque[tuple[Side, Document, list[Future[list[np.ndarray]]]]] = deque()

        def write_first() -> None:
            side, document, parts = pending.popleft()
            text = document.text
            size = len(text) if text.isascii() else len(text.encode())  # a long text is not copied to be counted
            name = f"{document.name}\t{document.language}"
            if document.marks:  # a repository: each part is a document, which fits into a row
                for number, part in enumerate(done(parts)):
                    writers[side].add([part], size if number == 0 else 0, name, document.value)
            else:
                edges = np.asarray(begin, dtype), np.asarray(end, dtype)
                writers[side].add(itertools.chain([edges[0]], done(parts), [edges[1]]), size, name, document.value)
            progress.advance(size)

        def done(parts: list[Future[list[np.ndarray]]]) -> Iterator[np.ndarray]:
            """The parts as they are tokenised; each is let go as soon as it is written."""
            parts.reverse()
            while parts:
                yield from parts.pop().result()

        def encode(piece: str) -> list[np.ndarray]:
            return [np.asarray(tokenizer.encode(piece), dtype)]

        def encode_repository(document: Document) -> list[np.ndarray]:
            rows = repository.encode(tokenizer, document.text, document.marks, begin, end, row_limit or sys.maxsize)
            return [row.astype(dtype) for row in rows]

        queued = 0
        for side, document in round_trip.look_at(documents):
            jobs = (
                [pool.submit(encode_repository, document)]
                if document.marks
                else [pool.submit(encode, part) for part in separable(document.text, piece_chars)]
            )
            pending.append((side, document, jobs))
            queued += len(document.text)
            while pending and (len(pending) > 64 * workers or queued > 16 * workers * PIECE_CHARS):
                queued -= len(pending[0][1].text)
                write_first()
        while pending:
            write_first()
    _write_meta(folder, dtype, writers, documents, round_trip.lossy)


def _write_meta(
    folder: Path, dtype: np.dtype, writers: dict[Side, _Writer], documents: Documents, lossy: tuple[int, int]
) -> None:
    """What the shards are, last of all: a folder without it is none."""
    digest = hashlib.sha256("".join(writers[side].digest() for side in SIDES).encode()).hexdigest()
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "fingerprint": digest,
        "unigram_entropy": _entropy(writers["train"].counts, writers["validation"].counts),
        "skipped": documents.skipped,
        "lossy": lossy,
        "sides": {side: writers[side].summary() for side in SIDES},
    }
    with (folder / "meta.json").open("w", encoding="utf-8", errors="replace") as file:
        json.dump(meta, file, indent=1)
        _sync(file)


class _Writer:
    """Appends documents to one side."""

    def __init__(self, folder: Path, dtype: np.dtype, vocab_size: int) -> None:
        folder.mkdir(parents=True)
        self.counts = np.zeros(vocab_size, np.int64)
        self._folder, self._dtype = folder, dtype
        self._ends = [0]
        self._names: list[str] = []
        self._values: list[float] = []
        self._text_bytes = 0
        self._sha = hashlib.sha256()
        self._file = (folder / "tokens.bin").open("wb")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._file:
            if kind is None:
                _sync(self._file)
        if kind is None:
            with (self._folder / "offsets.npy").open("wb") as file:
                np.save(file, np.asarray(self._ends, np.int64), allow_pickle=False)
                _sync(file)
            with (self._folder / "names.txt").open("w", encoding="utf-8", errors="replace", newline="\n") as file:
                file.writelines(f"{name}\n" for name in self._names)
                _sync(file)
            if not all(math.isnan(value) for value in self._values):
                with (self._folder / "values.npy").open("wb") as file:
                    np.save(file, np.asarray(self._values), allow_pickle=False)
                    _sync(file)

    def add(self, parts: Iterable[np.ndarray], text_bytes: int, name: str, value: float) -> None:
        """Append one document, given in parts."""
        self._values.append(value)
        self._names.append(name.replace("\n", " ").replace("\r", " "))
        end = self._ends[-1]
        for tokens in parts:
            self._file.write(tokens.data)
            self._sha.update(tokens.data)
            self.counts += np.bincount(tokens, minlength=len(self.counts))
            end += len(tokens)
        self._ends.append(end)
        self._text_bytes += text_bytes

    def digest(self) -> str:
        """sha256 (hex) of tokens and offsets."""
        return self._sha.hexdigest() + hashlib.sha256(np.asarray(self._ends, np.int64).data).hexdigest()

    def summary(self) -> dict[str, int]:
        """What `meta.json` says of this side."""
        sizes = {name: (self._folder / name).stat().st_size for name in ("tokens.bin", "offsets.npy")}
        return {"documents": len(self._ends) - 1, "tokens": self._ends[-1], "text_bytes": self._text_bytes, **sizes}


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _entropy(train: np.ndarray, validation: np.ndarray) -> float:
    if not validation.any():
        return float("nan")
    log_probability = np.log(train + 1.0) - np.log(train.sum() + len(train))
    return float(-(validation * log_probability).sum() / validation.sum())


def _read(folder: Path, *, reused: bool) -> Shards | None:
    """Open the shards; None when they are absent, of another format, or not of the sizes they were written with."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            return None
        sides = {side: _read_side(folder / side, meta["sides"][side], meta["dtype"]) for side in SIDES}
        return Shards(
            folder=folder,
            train=sides["train"],
            validation=sides["validation"],
            fingerprint=meta["fingerprint"],
            unigram_entropy=meta["unigram_entropy"],
            skipped=meta["skipped"],
            reused=reused,
            lossy=meta.get("lossy", ()),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_side(folder: Path, summary: dict[str, int], dtype: str) -> Shard:
    for name in ("tokens.bin", "offsets.npy"):
        if (folder / name).stat().st_size != summary[name]:
            raise ValueError(f"{folder / name}: truncated")
    offsets = cast(np.ndarray, np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False))
    count = summary["tokens"]
    if offsets.shape != (summary["documents"] + 1,) or offsets[0] != 0 or offsets[-1] != count:
        raise ValueError(f"{folder}: offsets do not fit")
    if np.any(np.diff(offsets) < 0):
        raise ValueError(f"{folder}: offsets do not rise")
    tokens = np.memmap(folder / "tokens.bin", dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)
    return Shard(tokens, offsets, summary["text_bytes"], folder)
