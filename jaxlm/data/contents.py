"""Bytes of a corpus file: what kind of file its name says, and its content unpacked.

`a.TXT.gz` is a text, `b.ndjson` and `c.jsonl.zst` are lines of rows, `d.json` is looked into (see `readers`).
"""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, Literal

from jaxlm.errors import UserError

Kind = Literal["text", "lines", "json", "parquet", "table"]

_PACKED = {
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ\x00", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", None),
}
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "table",
    ".tsv": "table",
}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Raised when a file cannot be read or unpacked."""


def kind_of(name: str) -> Kind:
    """The kind of a file by the ending of its name, in small or capital letters, compressed or not."""
    return _KINDS.get(Path(_unpacked_name(name)).suffix, "text")


def packed(name: str) -> bool:
    """Whether the name says that the file is compressed."""
    return _unpacked_name(name) != name.lower()


def unpacked(path: Path) -> Any:
    """A binary stream of the content, which is decompressed where the file's name says so.

    Raises:
        UserError: a package that reads this compression is missing.
        OSError: the file cannot be read, or is not what its name says.
    """
    ending = path.suffix.lower()
    if ending not in _PACKED:
        return path.open("rb")
    mark, opener = _PACKED[ending]
    with path.open("rb") as file:
        if file.read(len(mark)) != mark:
            raise OSError(f"its name says {ending}, its content does not")
    return opener(path) if opener else _zstandard(path)


def why_not_text(content: bytes) -> str:
    """Why bytes that are no UTF-8 text are not, by how they begin; empty where that does not tell."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16, not UTF-8 (iconv -f UTF-16 -t UTF-8 converts it)"
    for ending, (mark, _) in _PACKED.items():
        if content.startswith(mark):
            return f"is compressed, but its name does not end in {ending}"
    return "is binary, not text" if b"\0" in content else ""


def _unpacked_name(name: str) -> str:
    name = name.lower()
    ending = next((ending for ending in _PACKED if name.endswith(ending)), "")
    return name.removesuffix(ending)


def _zstandard(path: Path) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        hint = "pip install 'jaxlm[parquet]', or unpack it: zstd -d FILE"
        raise UserError(f"{path}: reading .zst needs the package pyarrow", hint)
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))  # pyright: ignore[reportArgumentType]
