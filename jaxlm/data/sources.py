"""The corpus as a stream of documents in a fixed order, each on the training or on the validation side.

A text file is one document; each row of `.jsonl`, `.jsonl.gz`, `.parquet` or a Hugging Face dataset is one. Sides are
chosen by a hash of the file name (of the text, for a row, so that copies of a row never lie on both sides). A document
that is the whole corpus is cut instead: its end is the validation part.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxlm.config import Data
from jaxlm.errors import UserError, did_you_mean

Side = Literal["train", "validation"]

RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
"""Endings of files whose rows are documents."""
MAX_LINE_BYTES = 64 << 20
MAX_EXPANSION = 250
"""How many times its size a compressed file may grow to; text reaches 20, a decompression bomb 1000."""

_NOT_CORPUS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_NOT_STDLIB = _NOT_CORPUS | {"test", "tests", "idle_test", "encodings", "pydoc_data"}


class File(NamedTuple):
    """One file of the corpus as it was when the corpus was opened."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int


class Document(NamedTuple):
    """A document: a name for messages, its text, and the key whose hash decides its side."""

    name: str
    text: str
    key: str


@dataclasses.dataclass(frozen=True)
class Source:
    """One `data.source`, opened: its files are listed and not yet read.

    Attributes:
        alone: the user named this very file, so that a bad one is an error; in a folder it is skipped.
        skipped: name to reason of what was left out; grows while `documents` runs.
    """

    where: str
    files: tuple[File, ...]
    text_key: str
    alone: bool = False
    dataset: Any = None
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    def identity(self) -> list[Any]:
        """What must be equal for the content to be taken as unchanged, without reading it.

        Names, sizes, and the times of the last change of content (mtime) and of the inode (ctime, which no program can
        set back): a changed file is noticed, and 30 MB need not be read on every start. The price is that a copied or
        touched corpus counts as new.
        """
        if self.dataset is not None:
            return [self.where, len(self.dataset), self.dataset._fingerprint]
        return [(file.name, file.size, file.mtime_ns, file.ctime_ns) for file in self.files]

    def documents(self) -> Iterator[Document]:
        """All documents with text, in the order of the files' names.

        Raises:
            UserError: a row is no JSON, has no `text_key`, or (when `alone`) the file is not UTF-8 text.
        """
        if self.dataset is not None:
            yield from self._rows(self.where, enumerate(self.dataset[self.text_key], start=1))
        for file in self.files:
            if file.name.endswith(".parquet"):
                yield from self._rows(file.name, self._parquet(file))
            elif file.name.endswith(RECORDS):
                yield from self._rows(file.name, self._jsonl(file))
            elif text := self._text(file):
                yield Document(file.name, text, file.name)

    def _rows(self, name: str, rows: Iterator[tuple[int, Any]]) -> Iterator[Document]:
        for row, text in rows:
            if not isinstance(text, str):
                raise UserError(f"{name}, row {row}: {self.text_key!r} is not text", "data.text_key names the field")
            try:
                text.encode()
            except UnicodeEncodeError:
                self._refuse(f"{name}, row {row}", "has half a surrogate pair, which is not UTF-8")
                continue
            if text:
                yield Document(f"{name}, row {row}", text, text)

    def _text(self, file: File) -> str:
        try:
            with file.path.open("rb") as stream:
                content = stream.read(8192)
                if b"\0" not in content:
                    content += stream.read()
        except OSError as error:
            self._refuse(file.name, f"cannot be read: {error.strerror}")
            return ""
        if b"\0" in content:
            self._refuse(file.name, "is binary, not text")
            return ""
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(file.name, f"is not UTF-8 (byte {error.start})")
            return ""

    def _jsonl(self, file: File) -> Iterator[tuple[int, Any]]:
        zipped = file.name.endswith(".gz")
        most = max(MAX_LINE_BYTES, MAX_EXPANSION * file.size)
        read = 0
        try:
            with gzip.open(file.path) if zipped else file.path.open("rb") as lines:
                row = 0
                while line := lines.readline(MAX_LINE_BYTES + 1):
                    row, read = row + 1, read + len(line)
                    if len(line) > MAX_LINE_BYTES:
                        raise UserError(f"{file.path}, row {row}: longer than {MAX_LINE_BYTES >> 20} MiB")
                    if zipped and read > most:
                        raise UserError(f"{file.path}: expands to more than {MAX_EXPANSION} times its size")
                    try:
                        text = line.decode("utf-8-sig" if row == 1 else "utf-8")
                    except UnicodeDecodeError:
                        self._refuse(f"{file.name}, row {row}", "is not UTF-8")
                        continue
                    if text.strip():
                        yield row, self._field(file, row, text)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file.path}: cannot be read: {error}") from None

    def _field(self, file: File, row: int, line: str) -> Any:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file.path}, row {row}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{file.path}, row {row}: not a JSON object")
        if self.text_key not in record:
            raise UserError(
                f"{file.path}, row {row}: no field {self.text_key!r} (data.text_key)",
                did_you_mean(self.text_key, record),
            )
        return record[self.text_key]

    def _parquet(self, file: File) -> Iterator[tuple[int, Any]]:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{file.path}: reading .parquet needs the package pyarrow", "pip install 'jaxlm[parquet]'")
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(file.path, memory_map=True) as table:
                names = table.schema_arrow.names
                if self.text_key not in names:
                    raise UserError(
                        f"{file.path}: no column {self.text_key!r} (data.text_key)", did_you_mean(self.text_key, names)
                    )
                groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
                if sum(group.total_byte_size for group in groups) > max(MAX_LINE_BYTES, MAX_EXPANSION * file.size):
                    raise UserError(f"{file.path}: expands to more than {MAX_EXPANSION} times its size")
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=[self.text_key]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield row, text
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file.path}: cannot be read: {str(error).splitlines()[0]}") from None

    def _refuse(self, name: str, reason: str) -> None:
        if self.alone:
            raise UserError(f"{self.where}: {name} {reason}" if name not in self.where else f"{self.where} {reason}")
        self.skipped[name] = reason


def open_source(where: str, data: Data) -> Source:
    """List the files of `"stdlib"`, a file, a folder or a Hugging Face dataset (`owner/name`, or `owner/name:config`).

    In a folder, hidden files, links and anything that is not a plain file are left out, so nothing outside it is read.

    Raises:
        UserError: there is no such thing, or it holds no file to read.
    """
    if where == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return Source(where, tuple(_walk(root, (".py",), _NOT_STDLIB)), data.text_key)
    path = Path(where).expanduser()
    if path.is_dir():
        files = tuple(_walk(path, data.extensions))
        if not files:
            endings = f" that ends in {', '.join(data.extensions)}" if data.extensions else ""
            raise UserError(
                f"{where}: the folder has no file{endings}", "data.source and data.extensions choose the files"
            )
        return Source(where, files, data.text_key)
    if path.is_file():
        return Source(where, (_file(path.name, path, path.stat()),), data.text_key, alone=True)
    return _hugging_face(where, data.text_key)


def _walk(root: Path, extensions: tuple[str, ...], without: frozenset[str] = _NOT_CORPUS) -> list[File]:
    found: list[File] = []
    folders = [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in without or entry.is_symlink():
                        continue
                    if entry.is_dir():
                        folders.append((f"{prefix}{entry.name}/", entry.path))
                    elif entry.name.endswith(extensions or "") and stat.S_ISREG((info := entry.stat()).st_mode):
                        found.append(_file(prefix + entry.name, Path(entry.path), info))
        except OSError as error:
            raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
    return sorted(found)


def _file(name: str, path: Path, info: os.stat_result) -> File:
    return File(name, path, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _hugging_face(where: str, text_key: str) -> Source:
    missing = f"data.source = {where!r}: no such file or folder"
    name, _, subset = where.partition(":")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or name.endswith((".txt", ".md", ".py", *RECORDS)):
        raise UserError(missing, "check the path")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(missing, "check the path; for a Hugging Face dataset: pip install 'jaxlm[datasets]'")
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        dataset = datasets.load_dataset(name, subset or None, split="train")
    except Exception as error:  # whatever the network, the hub or the loading script raises
        raise UserError(f"{missing}, nor a Hugging Face dataset: {str(error).splitlines()[0]}") from error
    if text_key not in dataset.column_names:
        raise UserError(
            f"{where}: no column {text_key!r} (data.text_key)", did_you_mean(text_key, dataset.column_names)
        )
    return Source(where, (), text_key, alone=True, dataset=dataset)


class Documents:
    """The corpus of `[data]`: an iterable of (side, document), the same on every run.

    Raises:
        UserError: while iterating, when no document is left for training, or a source cannot be read.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self._main = open_source(data.source, data)
        self._held_out = open_source(data.validation_source, data) if data.validation_source else None

    @property
    def size(self) -> int:
        """Bytes of all files, roughly what there is to read."""
        return sum(file.size for source in self._sources for file in source.files)

    @property
    def skipped(self) -> dict[str, str]:
        """Name to reason of what was left out so far."""
        return {name: reason for source in self._sources for name, reason in source.skipped.items()}

    def identity(self) -> str:
        """sha256 of the sources' identities and the options that choose and cut documents."""
        data = self._data
        options = [data.text_key, data.validation_fraction, bool(data.validation_source), data.max_bytes]
        content = json.dumps([options, *(source.identity() for source in self._sources)])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def __iter__(self) -> Iterator[tuple[Side, Document]]:
        train = 0
        for side, document in self._sides():
            train += side == "train"
            yield side, document
        if not train:
            raise UserError(f"data.source = {self._data.source!r}: the corpus is empty{_example(self.skipped)}")

    @property
    def _sources(self) -> list[Source]:
        return [self._main] + ([self._held_out] if self._held_out else [])

    def _sides(self) -> Iterator[tuple[Side, Document]]:
        if self._held_out:
            for document in self._capped(self._main):
                yield "train", document
            for document in self._capped(self._held_out):
                yield "validation", document
            return
        fraction = self._data.validation_fraction
        few = self._keys_on_one_side() if fraction else set()
        smallest = min(few, key=_uniform, default=None)
        for document in self._capped(self._main):
            if len(few) == 1:
                yield from self._cut(document)
            elif document.key == smallest if few else _uniform(document.key) < fraction:
                yield "validation", document
            else:
                yield "train", document

    def _keys_on_one_side(self) -> set[str]:
        """All keys of a corpus so small that the hash would leave one side empty; no keys otherwise."""
        keys: set[str] = set()
        sides: set[bool] = set()
        for document in self._capped(self._main):
            keys.add(document.key)
            sides.add(_uniform(document.key) < self._data.validation_fraction)
            if len(sides) == 2:
                return set()
        return keys

    def _cut(self, document: Document) -> Iterator[tuple[Side, Document]]:
        text = document.text
        at = round(len(text) * (1 - self._data.validation_fraction))
        at = text.rfind("\n", 0, at) + 1 or at
        if at:
            yield "train", document._replace(text=text[:at])
        if at < len(text):
            yield "validation", document._replace(text=text[at:])

    def _capped(self, source: Source) -> Iterator[Document]:
        left = self._data.max_bytes
        for document in source.documents():
            if not self._data.max_bytes:
                yield document
                continue
            content = document.text.encode()
            text = content[:left].decode(errors="ignore")
            if text:
                yield document._replace(text=text)
            left -= len(content)
            if left <= 0:
                return


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of about `size` characters, after a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def describe_skipped(skipped: dict[str, str]) -> str:
    """`3 skipped, e.g. a.bin is binary, not text`; empty when nothing was."""
    return f"{len(skipped)} skipped{_example(skipped)}" if skipped else ""


def _example(skipped: dict[str, str]) -> str:
    first = [f"{name} {reason}" for name, reason in list(skipped.items())[:3]]
    return f", e.g. {'; '.join(first)}" if first else ""


def _uniform(key: str) -> float:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
