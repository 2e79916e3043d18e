"""Reading one source: a text file is a document, a row of `.jsonl`, `.parquet`, `.csv`, `.json` or the hub is one."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import importlib.util
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError, did_you_mean
from jaxlm.text.languages import language

RECORDS = (".jsonl", ".jsonl.gz", ".parquet")
"""Endings of files whose rows are documents."""
MAX_LINE_BYTES = 64 << 20
MAX_EXPANSION = 250
"""How many times its size a compressed file may grow to; text reaches 20, a decompression bomb 1000."""


class File(NamedTuple):
    """One file of the corpus as it was when the corpus was opened."""

    name: str
    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int


class Document(NamedTuple):
    """A document: a name for messages, its text, and the key whose hash decides its side.

    Attributes:
        language: in small letters; empty where neither name nor first line tell it.
        marks: where special tokens stand in the text: (place, name of the token), in rising order.
        value: the field that a curriculum goes by; NaN without one.
    """

    name: str
    text: str
    key: str
    language: str = ""
    marks: tuple[tuple[int, str], ...] = ()
    value: float = math.nan


class Reading(NamedTuple):
    """How rows and files become documents.

    Attributes:
        text_key: field that holds the text of a row.
        template: text of a row instead, with `{field}` for the text of a field.
        row_files: endings of further files whose rows are documents: `.csv`, `.json`.
        languages: leave out files of other languages; empty: none.
        value_key: field of a row that holds a number for a curriculum.
    """

    text_key: str = "text"
    template: str = ""
    row_files: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    value_key: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
    """One `data.source`, opened: its files are listed and not yet read.

    Attributes:
        alone: the user named this very file, so that a bad one is an error; in a folder it is skipped.
        skipped: name to reason of what was left out; grows while `documents` runs.
    """

    where: str
    files: tuple[File, ...]
    reading: Reading = dataclasses.field(default_factory=Reading)
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
            yield from self._rows(self.where, self._hub())
        for file in self.files:
            if rows := self._row_reader(file):
                yield from self._rows(file.name, rows(file))
            elif text := self._text(file):
                spoken = language(file.name, text[: text.find("\n")])
                if not self.reading.languages or spoken in self.reading.languages:
                    if self.reading.value_key:
                        self._without_field(file.name, self.reading.value_key)
                    yield Document(file.name, text, file.name, spoken)

    def _row_reader(self, file: File) -> Callable[[File], Iterator[tuple[int, Mapping[str, Any]]]] | None:
        if file.name.endswith(".parquet"):
            return self._parquet
        if file.name.endswith(RECORDS):
            return self._jsonl
        if file.name.endswith(self.reading.row_files or "\0"):
            return self._csv if file.name.endswith((".csv", ".tsv")) else self._json
        return None

    def _rows(self, name: str, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[Document]:
        for row, record in rows:
            text = self._text_of(name, row, record)
            if not isinstance(text, str):
                key = self.reading.text_key
                raise UserError(f"{name}, row {row}: {key!r} is not text", "data.text_key names the field")
            try:
                text.encode()
            except UnicodeEncodeError:
                self._refuse(f"{name}, row {row}", "has half a surrogate pair, which is not UTF-8")
                continue
            spoken = record.get("language")
            spoken = spoken.lower() if isinstance(spoken, str) else ""
            if text and (not self.reading.languages or spoken in self.reading.languages):
                yield Document(f"{name}, row {row}", text, text, spoken, (), self._value(name, row, record))

    def _text_of(self, name: str, row: int, record: Mapping[str, Any]) -> Any:
        if not self.reading.template:
            return record[self.reading.text_key]

        def field(found: re.Match[str]) -> str:
            if found[1] not in record:
                hint = did_you_mean(found[1], record)
                raise UserError(f"{name}, row {row}: no field {found[1]!r} (data.template)", hint)
            return str(record[found[1]])

        return re.sub(r"\{(\w+)\}", field, self.reading.template)

    def _value(self, name: str, row: int, record: Mapping[str, Any]) -> float:
        key = self.reading.value_key
        if not key:
            return math.nan
        value = record.get(key)
        if isinstance(value, str):  # of .csv
            try:
                value = float(value)
            except ValueError:
                value = None
        if not isinstance(value, int | float) or not math.isfinite(value):
            self._without_field(f"{name}, row {row}", key)
        return float(value or 0)

    def _without_field(self, where: str, key: str) -> None:
        raise UserError(
            f"{where}: no number {key!r} (data.curriculum.by)", "give every row one, or choose another field"
        )

    def _hub(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if not (self.reading.template or self.reading.value_key or self.reading.languages):
            for row, text in enumerate(self.dataset[self.reading.text_key], start=1):
                yield row, {self.reading.text_key: text}
            return
        yield from enumerate(self.dataset, start=1)

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

    def _jsonl(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
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
                        yield row, self._record(file, row, text)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file.path}: cannot be read: {error}") from None

    def _record(self, file: File, row: int, line: str) -> Mapping[str, Any]:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file.path}, row {row}: not JSON: {error}") from None
        return self._with_text(file, row, record)

    def _with_text(self, file: File, row: int, record: Any) -> Mapping[str, Any]:
        if not isinstance(record, dict):
            raise UserError(f"{file.path}, row {row}: not a JSON object")
        key = self.reading.text_key
        if not self.reading.template and key not in record:
            raise UserError(f"{file.path}, row {row}: no field {key!r} (data.text_key)", did_you_mean(key, record))
        return record

    def _json(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if file.size > MAX_LINE_BYTES:
            raise UserError(f"{file.path}: longer than {MAX_LINE_BYTES >> 20} MiB", "write one row a line, as .jsonl")
        try:
            rows = json.loads(file.path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file.path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise UserError(f"{file.path}: not an array of rows", "remove .json from data.row_files")
        for row, record in enumerate(rows, start=1):
            yield row, self._with_text(file, row, record)

    def _csv(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
        csv.field_size_limit(MAX_LINE_BYTES)
        try:
            with file.path.open(encoding="utf-8-sig", newline="") as lines:
                rows = csv.DictReader(lines, delimiter="\t" if file.name.endswith(".tsv") else ",", strict=True)
                for row, record in enumerate(rows, start=2):  # the first line names the fields
                    yield row, self._with_text(file, row, {str(name): text for name, text in record.items()})
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file.path}: cannot be read: {error}") from None

    def _parquet(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{file.path}: reading .parquet needs the package pyarrow", "pip install 'jaxlm[parquet]'")
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(file.path, memory_map=True) as table:
                columns = self._columns(file, table.schema_arrow.names)
                groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
                if sum(group.total_byte_size for group in groups) > max(MAX_LINE_BYTES, MAX_EXPANSION * file.size):
                    raise UserError(f"{file.path}: expands to more than {MAX_EXPANSION} times its size")
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    for record in batch.to_pylist():
                        row += 1
                        yield row, record
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file.path}: cannot be read: {str(error).splitlines()[0]}") from None

    def _columns(self, file: File, names: Sequence[str]) -> list[str]:
        """The columns that are read."""
        reading = self.reading
        wanted = re.findall(r"\{(\w+)\}", reading.template) if reading.template else [reading.text_key]
        for key in wanted:
            if key not in names:
                option = "data.template" if reading.template else "data.text_key"
                raise UserError(f"{file.path}: no column {key!r} ({option})", did_you_mean(key, names))
        further = [reading.value_key, "language"] if reading.value_key or reading.languages else []
        return [*dict.fromkeys([*wanted, *(key for key in further if key in names)])]

    def _refuse(self, name: str, reason: str) -> None:
        if self.alone:
            raise UserError(f"{self.where}: {name} {reason}" if name not in self.where else f"{self.where} {reason}")
        self.skipped[name] = reason
