"""Rows of tables as dicts: `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, each also `.gz` but the last, or a folder."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LARGEST = 2**32
"""Bytes that a compressed table may expand to."""


class Record(NamedTuple):
    """One row."""

    where: str
    """File and row, for messages."""
    fields: dict[str, Any]


def records(source: str) -> Iterator[Record]:
    """The rows of a file, of all tables of a folder in the order of their names, or of a Hugging Face dataset.

    Raises:
        UserError: there is no such thing, it is no table, or a row of it is damaged; with file and row.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file() and _ending(file)]
        if not found:
            raise UserError(f"{source}: the folder has no table", f"jaxlm reads {', '.join(ENDINGS)}")
        for file in found:
            yield from _of_file(file)
    elif path.is_file():
        if not _ending(path):
            raise UserError(f"{source}: not a table by its name", f"jaxlm reads {', '.join(ENDINGS)}")
        yield from _of_file(path)
    else:
        yield from _of_dataset(source)


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def _of_file(path: Path) -> Iterator[Record]:
    ending = _ending(path)
    if ending == ".parquet":
        yield from _parquet(path)
        return
    text = _text(path)
    if ending == ".jsonl":
        for row, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _record(path, row, _parse(path, row, line))
    elif ending == ".json":
        content = _parse(path, 0, text)
        if isinstance(content, dict):  # {"data": [...]} of some exports
            content = next((value for value in content.values() if isinstance(value, list)), [content])
        for row, one in enumerate(content if isinstance(content, list) else [content], 1):
            yield _record(path, row, one)
    else:
        yield from _separated(path, text, "\t" if ending == ".tsv" else "")


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if len(content) > LARGEST:
        raise UserError(f"{path}: more than {LARGEST >> 30} GiB of text")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # as spreadsheets save "Unicode text"
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})", "save it as CSV UTF-8") from None


def _parse(path: Path, row: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{f', row {row}' if row else ''}: not JSON: {error}") from None


def _record(path: Path, row: int, content: Any) -> Record:
    if not isinstance(content, dict):
        raise UserError(f"{path}, row {row}: not a JSON object but {type(content).__name__}")
    return Record(f"{path}, row {row}", content)


def _separated(path: Path, text: str, separator: str) -> Iterator[Record]:
    """Rows of a CSV or TSV with a header, which shows what separates them; a TSV has no quotes around fields."""
    header = text[: text.find("\n")] if "\n" in text else text
    if not separator:
        separator = max(",;\t", key=header.count)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    quoted = csv.QUOTE_MINIMAL if separator != "\t" or '"' in header else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoted)
    try:
        names = next(reader, [])
        for row, values in enumerate(reader, 2):
            if not any(values):  # an empty row of a spreadsheet
                continue
            if len(values) != len(names):
                raise UserError(f"{path}, row {row}: {len(values)} fields, the header has {len(names)}")
            yield Record(f"{path}, row {row}", dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}: no table: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: reading .parquet needs the package pyarrow", "pip install 'jaxlm[parquet]'")
    import pyarrow
    import pyarrow.parquet as parquet

    row = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as table:
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    row += 1
                    yield Record(f"{path}, row {row}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _of_dataset(source: str) -> Iterator[Record]:
    missing = f"{source}: no such file or folder"
    if importlib.util.find_spec("datasets") is None or source.startswith((".", "/", "~")):
        raise UserError(missing, "check the path; for a Hugging Face dataset: pip install 'jaxlm[datasets]'")
    import datasets  # pyright: ignore[reportMissingImports]

    name, _, subset = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, subset or None, split="train")
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{missing}, nor a Hugging Face dataset: {reason}") from None
    for row, fields in enumerate(dataset, 1):
        yield Record(f"{source}, row {row}", dict(fields))
