"""Reading one source: a text file is a document, a row of `.jsonl`, `.parquet`, `.csv`, `.json` or the hub is one.

A bad row is skipped and named, until there are more than `data.max_bad_rows` or no row is good.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data import contents
from jaxlm.errors import UserError, did_you_mean
from jaxlm.text.languages import language

RECORDS = (".jsonl", ".ndjson", ".json", ".gz", ".bz2", ".xz", ".zst", ".parquet")
"""Endings of files, which no name of a data set has."""
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
        max_bad_rows: how many rows without text are skipped.
    """

    text_key: str = "text"
    template: str = ""
    row_files: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    value_key: str = ""
    max_bad_rows: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """One `data.source`, opened: its files are listed and not yet read.

    Attributes:
        alone: the user named this very file, so that a bad one is an error; in a folder it is skipped.
        skipped: name to reason of what was left out; grows while `documents` runs.
        bad: the rows among them.
    """

    where: str
    files: tuple[File, ...]
    reading: Reading = dataclasses.field(default_factory=Reading)
    alone: bool = False
    dataset: Any = None
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    bad: dict[str, UserError] = dataclasses.field(default_factory=dict)

    @property
    def rows_only(self) -> bool:
        """True if no document of it is a whole file; files that only their content tells apart are opened last."""
        files = sorted(self.files, key=lambda file: contents.kind_of(file.name) == "json")
        return self.dataset is not None or all(self._row_reader(file) is not None for file in files)

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
            UserError: too many rows or all of them are no JSON or have no text under `text_key`, or (when `alone`) the
                file is not UTF-8 text.
        """
        good = False
        for document in self._documents():
            good = True
            yield document
        if not good and self.bad:
            raise next(iter(self.bad.values()))

    def _documents(self) -> Iterator[Document]:
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
        kind = contents.kind_of(file.name)
        if kind == "parquet":
            return self._parquet
        if kind == "lines":
            return self._jsonl
        if file.name.lower().endswith(self.reading.row_files or "\0"):
            return self._csv if kind == "table" else self._json
        return self._json_reader(file) if kind == "json" else None

    def _json_reader(self, file: File) -> Callable[[File], Iterator[tuple[int, Mapping[str, Any]]]] | None:
        """How a file `.json` is read by its content; None: it is a text, such as the settings of a program."""
        try:
            with contents.unpacked(file.path) as stream:
                head = stream.readline(MAX_LINE_BYTES + 1).removeprefix(b"\xef\xbb\xbf").strip()
                more = bool(stream.read(1024).strip())
            if head.startswith(b"["):
                rows = _loads(self._whole(file))
                if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
                    return self._json if self._has_text(file, rows) else _nothing
            elif isinstance(row := _loads(head.decode()), dict) and (more or self.reading.text_key in row):
                return self._jsonl if self._has_text(file, [row]) else _nothing
        except (*contents.DAMAGED, ValueError, RecursionError):  # the readers say what is wrong
            pass
        if self.alone:
            message = f"{file.path}: neither an array of JSON objects nor one in each line"
            raise UserError(message, "give it another ending, such as .txt, to read it as a text")
        return None

    def _has_text(self, file: File, rows: list[dict[str, Any]]) -> bool:
        """Whether rows have the field of the text; a file of a folder that has none is skipped."""
        key = self.reading.text_key
        if self.alone or self.reading.template or any(key in row for row in rows):
            return True
        self._refuse(file.name, f"has rows without the field {key!r} (data.text_key)")
        return False

    def _whole(self, file: File) -> str:
        """The text of a file that cannot be read in parts."""
        with contents.unpacked(file.path) as stream:
            content = stream.read(MAX_LINE_BYTES + 1)
        if len(content) > MAX_LINE_BYTES:
            raise UserError(f"{file.path}: longer than {MAX_LINE_BYTES >> 20} MiB", "write one row a line, as .jsonl")
        return content.decode("utf-8-sig")

    def _bad_row(self, where: str, error: UserError) -> None:
        """Note a row that is skipped; raise when there are too many."""
        self.bad.setdefault(where, error)
        self.skipped[where] = error.message.partition(where.rpartition(", ")[2])[2].lstrip(": ")
        if len(self.bad) > self.reading.max_bad_rows > 0:
            more = f"more than data.max_bad_rows = {self.reading.max_bad_rows} rows are bad"
            raise UserError(f"{error.message}; {more}", error.hint)
        if not self.reading.max_bad_rows:
            raise error

    def _rows(self, name: str, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> Iterator[Document]:
        for row, record in rows:
            where = f"{name}, row {row}"
            text = self._text_of(name, row, record)
            if not isinstance(text, str):
                key = self.reading.text_key
                self._bad_row(where, UserError(f"{where}: {key!r} is not text", "data.text_key names the field"))
                continue
            try:
                text.encode()
            except UnicodeEncodeError:
                self._bad_row(where, UserError(f"{where} has half a surrogate pair, which is not UTF-8"))
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
            with contents.unpacked(file.path) as stream:
                content = stream.read(8192)
                if b"\0" not in content:
                    most = self._most(file) if contents.packed(file.name) else file.size + MAX_LINE_BYTES
                    content += stream.read(most)
                    if stream.read(1):
                        raise UserError(f"{file.path}: expands to more than {MAX_EXPANSION} times its size")
        except contents.DAMAGED as error:
            self._refuse(file.name, f"cannot be read: {getattr(error, 'strerror', None) or error}")
            return ""
        if b"\0" in content:
            self._refuse(file.name, contents.why_not_text(content))
            return ""
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._refuse(file.name, contents.why_not_text(content) or f"is not UTF-8 (byte {error.start})")
            return ""

    def _most(self, file: File) -> int:
        """Bytes that a compressed file may hold."""
        return max(MAX_LINE_BYTES, MAX_EXPANSION * file.size)

    def _jsonl(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
        zipped = contents.packed(file.name)
        most, read = self._most(file), 0
        try:
            with contents.unpacked(file.path) as lines:
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
                        where = f"{file.name}, row {row}"
                        self._bad_row(where, UserError(f"{where} is not UTF-8"))
                        continue
                    if text.strip() and (record := self._record(file, row, text)) is not None:
                        yield row, record
        except contents.DAMAGED as error:
            raise UserError(f"{file.path}: cannot be read: {error}") from None

    def _record(self, file: File, row: int, line: str) -> Mapping[str, Any] | None:
        try:
            record = _loads(line)
        except (ValueError, RecursionError) as error:
            self._bad_row(f"{file.name}, row {row}", UserError(f"{file.path}, row {row}: not JSON: {error}"))
            return None
        return self._with_text(file, row, record)

    def _with_text(self, file: File, row: int, record: Any) -> Mapping[str, Any] | None:
        """The record, or None for one that is skipped."""
        where, key = f"{file.path}, row {row}", self.reading.text_key
        if not isinstance(record, dict):
            self._bad_row(f"{file.name}, row {row}", UserError(f"{where}: not a JSON object"))
            return None
        if not self.reading.template and key not in record:
            error = UserError(f"{where}: no field {key!r} (data.text_key)", did_you_mean(key, record))
            self._bad_row(f"{file.name}, row {row}", error)
            return None
        return record

    def _json(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
        try:
            rows = _loads(self._whole(file))
        except (*contents.DAMAGED, ValueError, RecursionError) as error:
            raise UserError(f"{file.path}: not JSON: {error}") from None
        if not isinstance(rows, list):
            raise UserError(f"{file.path}: not an array of rows", "remove .json from data.row_files")
        for row, record in enumerate(rows, start=1):
            if (good := self._with_text(file, row, record)) is not None:
                yield row, good

    def _csv(self, file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
        csv.field_size_limit(MAX_LINE_BYTES)
        try:
            with file.path.open(encoding="utf-8-sig", newline="") as lines:
                delimiter = "\t" if file.name.lower().endswith(".tsv") else ","
                rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
                for row, record in enumerate(rows, start=2):  # the first line names the fields
                    good = self._with_text(file, row, {str(name): text for name, text in record.items()})
                    if good is not None:
                        yield row, good
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


def _nothing(file: File) -> Iterator[tuple[int, Mapping[str, Any]]]:
    yield from ()


def _loads(text: str | bytes) -> Any:
    """A JSON value; a number of more digits than Python takes for one comes as its digits."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=str)
