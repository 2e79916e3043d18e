"""A teacher's likeliest tokens at each place of the rows of a run, kept in files by the number of a row.

    FOLDER/manifest.json               whose tokens, of which teacher, and the sha256 of each shard
    FOLDER/train-0.safetensors ...     rows of the run in their order; `held_out-N-...` those of a held-out set

A shard holds `ids` and `logps` [R, T, K], `rest` [R, T], the log-probability of all other tokens together, and `rows`
[R], digests of the rows, so that no row is ever given what belongs to another one.

Shapes: R rows of a shard, B rows of a batch, T tokens, K likeliest tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.data.rows.validation import HeldOut
from jaxlm.errors import UserError
from jaxlm.processes.file_lock import exclusive
from jaxlm.text.tokenizer import Tokenizer

Batch = Mapping[str, np.ndarray]
COLUMNS = {"logps": "teacher_logps", "ids": "teacher_ids", "rest": "teacher_rest"}
"""Arrays of a shard, in the order of `LikeliestTokens`, and the columns of a batch that they become."""
SHARD_BYTES = 64 << 20
_FORMAT = 1
_NAMES = {
    "teacher": "teacher, by the sha256 of its parameters",
    "temperature": "distill.temperature",
    "size": "distill.cache_size",
    "tokens": "number of tokens that both vocabularies have",
    "dtype": "numerics.params",
}


class TeacherCache:
    """The files of one cache.

    Args:
        folder: where they lie.
        about: what the cache must be of: `teacher`, `temperature`, `size`, `tokens`, `dtype`.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = Path(folder), dict(about)
        self._where = f"distill.cache = {str(folder)!r}"
        self._shards: dict[str, list[dict[str, Any]]] = {}
        self._opened = False

    def open(self, *, again: bool = False) -> None:
        """Read the manifest, if there is one, and check every shard; once, or `again`.

        Raises:
            UserError: the cache is of another teacher or made with other options, or a shard is cut short or changed.
        """
        path = self.folder / "manifest.json"
        if (self._opened and not again) or not path.is_file():
            return
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            about, shards = dict(manifest["about"]), dict(manifest["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self._where}: {path} is no manifest of a cache", self._anew) from None
        for key, wanted in {"format": _FORMAT, **self.about}.items():
            if about.get(key) != wanted:
                what = f"{self._where} was made with another {_NAMES.get(key, key)}"
                raise UserError(f"{what}: {about.get(key)} there, {wanted} here", self._anew)
        for shard in (one for shards_of_set in shards.values() for one in shards_of_set):
            file = self.folder / shard["file"]
            size = file.stat().st_size if file.is_file() else 0
            if not file.is_file():
                raise UserError(f"{file}: missing", self._anew)
            if size != shard["bytes"]:
                raise UserError(f"{file}: {size} bytes of {shard['bytes']}, it was cut short", self._anew)
            if _sha256(file) != shard["sha256"]:
                raise UserError(f"{file}: its sha256 is not that of the manifest, it was changed", self._anew)
        self._shards, self._opened = shards, True

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of which there are rows."""
        return tuple(self._shards)

    def rows(self, name: str) -> int:
        """How many rows of a set there are."""
        return sum(shard["rows"] for shard in self._shards.get(name, ()))

    def append(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a shard of the next rows of a set; the manifest, which makes it part of the cache, comes last.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        shards = self._shards.setdefault(name, [])
        file = self.folder / f"{name}-{len(shards)}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, file)
            shard = {"file": file.name, "rows": len(arrays["rows"]), "bytes": file.stat().st_size}
            shards.append({**shard, "sha256": _sha256(file)})
            temporary = self.folder / "manifest.tmp"
            content = {"about": {"format": _FORMAT, **self.about}, "shards": self._shards}
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.folder / "manifest.json")
        except OSError as error:
            raise UserError(f"{self._where}: cannot be written: {error.strerror}") from None

    def read(self, name: str, numbers: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
        """The columns of these rows [B] of a set, which stand in `batch`.

        Raises:
            UserError: a row is not in the cache, or was another one when the cache was made.
        """
        self.require(name, int(numbers.max()) + 1)
        shards = self._shards[name]
        ends = np.cumsum([shard["rows"] for shard in shards])
        found: dict[str, list[np.ndarray]] = {key: [] for key in (*COLUMNS, "rows")}
        for number in numbers.tolist():
            shard = int(np.searchsorted(ends, number, side="right"))
            at = number - int(ends[shard] - shards[shard]["rows"])
            for key, array in self._shard(self.folder / shards[shard]["file"]).items():
                found[key].append(array[at : at + 1])
        if not np.array_equal(np.concatenate(found.pop("rows")), digests(batch)):
            raise UserError(f"{self._where} was made of other rows: the data or its options have changed", self._anew)
        return {COLUMNS[key]: np.concatenate(arrays) for key, arrays in found.items()}

    def require(self, name: str, count: int) -> None:
        """Refuse a cache with fewer rows of a set.

        Raises:
            UserError: there are fewer.
        """
        if (rows := self.rows(name)) < count:
            hint = "`jaxlm data teach CONFIG` makes it, or goes on with it"
            raise UserError(f"{self._where} has {rows:,} rows of the set {name!r}, the run needs {count:,}", hint)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a cache lives as long as its run)
    def _shard(self, file: Path) -> dict[str, Any]:
        opened = safe_open(file, "numpy")
        return {key: opened.get_slice(key) for key in (*COLUMNS, "rows")}

    @property
    def _anew(self) -> str:
        return f"remove {self.folder} and run `jaxlm data teach CONFIG`, or name another folder"


def digests(batch: Batch) -> np.ndarray:
    """A number [B] for the content of each row, as far as a teacher reads it."""
    arrays = [np.ascontiguousarray(batch[name], np.int32) for name in ("tokens", "positions", "segments")]
    made = [
        hashlib.blake2b(b"".join(array.tobytes() for array in row), digest_size=8) for row in zip(*arrays, strict=True)
    ]
    return np.frombuffer(b"".join(one.digest() for one in made), np.int64)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


Teacher = Callable[[Batch], Mapping[str, np.ndarray]]
"""From a batch to the arrays `ids`, `logps` and `rest` of its rows."""


@dataclasses.dataclass(frozen=True)
class TaughtRows:
    """The rows of another source, with the columns of a teacher's cache; see `train.recipe.DataSource`."""

    inner: Any
    cache: TeacherCache
    steps: int
    held_out_batches: int
    batch_size: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to the ids of the rows."""
        return self.inner.tokenizer

    @property
    def updates_per_phase(self) -> int:
        """As the other source has it."""
        return self.inner.updates_per_phase

    def begin_phase(self, number: int, engine: Any) -> None:
        """As the other source does."""
        self.inner.begin_phase(number, engine)

    def identity(self) -> dict[str, str]:
        """That of the rows, and the teacher of the cache, which is read and checked here."""
        self.cache.open()
        return {**self.inner.identity(), "teacher": f"{self.cache.about['teacher']} {self.cache.about['size']}"}

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> _Batches:
        """Training batches with what the teacher thinks of them.

        Raises:
            UserError: the cache has not all rows of the run.
        """
        share = np.arange(batch_size) if rows is None else rows
        self.cache.open()
        inner = self.inner.batches(batch_size=batch_size, rows=rows)
        count = min(self.steps, getattr(inner, "count", math.inf))
        self.cache.require("train", int(count) * batch_size)
        return _Batches(inner, self.cache, batch_size, share)

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        """The held-out sets with the same columns."""
        share = np.arange(batch_size) if rows is None else rows
        sets = self.inner.held_out(batch_size=batch_size, rows=rows, max_batches=max_batches)

        def taught(number: int, one: HeldOut) -> Iterator[dict[str, np.ndarray]]:
            for index, batch in enumerate(one.batches()):
                yield {**batch, **self.cache.read(_held_out(number), index * batch_size + share, batch)}

        return [one._replace(batches=functools.partial(taught, number, one)) for number, one in enumerate(sets)]

    def teach(self, teacher: Teacher, progress: Callable[[int], None] = lambda rows: None) -> dict[str, int]:
        """Write what the cache lacks; returns the number of rows of each set. A second teacher waits for the first.

        Args:
            progress: called with the number of rows after each batch.

        Raises:
            UserError: the cache is of something else (see `TeacherCache.open`) or of other rows, or it cannot be
                written.
        """
        with exclusive(self.cache.folder / "manifest.json", "distill.cache"):
            for name, batches in self._missing():
                waiting: list[dict[str, np.ndarray]] = []
                for batch in batches:
                    waiting.append({**teacher(batch), "rows": digests(batch)})
                    progress(len(waiting[-1]["rows"]))
                    if sum(array.nbytes for one in waiting for array in one.values()) >= SHARD_BYTES:
                        self.cache.append(name, _joined(waiting))
                        waiting = []
                if waiting:
                    self.cache.append(name, _joined(waiting))
        return {name: self.cache.rows(name) for name in self.cache.sets}

    def _missing(self) -> list[tuple[str, Iterator[Batch]]]:
        """Each set of the run by name, with its batches from the first that the cache lacks."""
        self.cache.open(again=True)  # another teacher may just have written
        inner = self.inner.batches(batch_size=self.batch_size, rows=None)
        count = int(min(self.steps, getattr(inner, "count", math.inf)))
        first = max(0, min(self._begun("train"), count) - 1)
        inner.set_state({**inner.get_state(), "next_index": first})
        train = itertools.islice(iter(inner.__next__, None), count - first)
        sets = self.inner.held_out(batch_size=self.batch_size, rows=None, max_batches=self.held_out_batches)
        others = [(_held_out(number), self._after(_held_out(number), one.batches())) for number, one in enumerate(sets)]
        return [("train", self._after("train", train, first)), *others]

    def _after(self, name: str, batches: Iterator[Batch], first: int = 0) -> Iterator[Batch]:
        """The batches of a set, the next of which is number `first`, after those that the cache has.

        Raises:
            UserError: the last of those is of other rows in the cache.
        """
        there = enumerate(itertools.islice(batches, max(0, self._begun(name) - first)), first)
        for number, batch in collections.deque(there, maxlen=1):
            self.cache.read(name, number * self.batch_size + np.arange(self.batch_size), batch)
        return batches

    def _begun(self, name: str) -> int:
        """Batches of a set that the cache has."""
        batches, rest = divmod(self.cache.rows(name), self.batch_size)
        if rest:
            message = f"distill.cache: its rows of the set {name!r} are no whole number of batches of {self.batch_size}"
            raise UserError(message, "train.batch_size as it was, or another folder")
        return batches


class _Batches:
    """Batches with the columns of a cache. The number of the next batch is in the state of the inner ones."""

    def __init__(self, inner: Any, cache: TeacherCache, batch_size: int, share: np.ndarray) -> None:
        self._inner, self._cache, self._batch_size, self._share = inner, cache, batch_size, share
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch, numbers = next(self._inner), self._next * self._batch_size + self._share
        self._next += 1
        return {**batch, **self._cache.read("train", numbers, batch)}

    def get_state(self) -> dict[str, Any]:
        """That of the batches without the cache."""
        return self._inner.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on with the batch of a state."""
        self._inner.set_state(state)
        self._next = int(state["next_index"])


def _held_out(number: int) -> str:
    return f"held_out-{number}"


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
