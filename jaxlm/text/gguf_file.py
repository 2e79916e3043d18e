"""The head of a GGUF file: its metadata and its table of tensors, each length compared with the file before it is read.

    "GGUF"  uint32 version  uint64 tensors  uint64 keys
    string key, uint32 type, value                                            for each key
    string name, uint32 axes, uint64 size of each, uint32 type, uint64 offset  for each tensor, fastest axis first
    padding to `general.alignment`, then the tensors

A string is its uint64 length and UTF-8; an array is a uint32 type, a uint64 length and the values (ggml, docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_MAX_AXES = 4
_DAMAGED = "damaged, or not copied to its end: copy it again"


class Stored(NamedTuple):
    """One tensor of the table."""

    shape: tuple[int, ...]
    """Slowest axis first, as numpy has it."""
    kind: int
    """Number of its type in ggml."""
    offset: int
    """In the file."""


class Head(NamedTuple):
    """Everything that stands before the tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata.

        Raises:
            UserError: it is missing and there is no default, or of another type.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path}: the metadata has no {key}", "which program wrote the file?")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{self.path}: {key} is {str(value)[:40]!r}, not of type {kind.__name__}", _DAMAGED)
        return value


def read_head(path: str | Path) -> Head:
    """Read the metadata and the table of tensors of a GGUF file.

    Raises:
        UserError: the file is missing or no GGUF file, ends too early, or says of itself what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] != MAGIC:
            raise UserError(f"{path}: not a GGUF file: it begins with {start[:4]!r}")
        if (version := int.from_bytes(start[4:8], "little")) not in VERSIONS:
            read = " and ".join(map(str, VERSIONS))
            raise UserError(f"{path}: GGUF version {version}, jaxlm reads {read}", "little-endian files only")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read(path, _Reader(path, mapped))


def _read(path: Path, reader: _Reader) -> Head:
    reader.at = 8
    count, keys = reader.number("<u8"), reader.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string()
        if key in metadata:
            raise UserError(f"{path}: the key {key} is there twice", _DAMAGED)
        metadata[key] = reader.value(reader.number("<u4"))
    table = [reader.entry() for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment % 8:
        raise UserError(f"{path}: general.alignment = {alignment!r} is no multiple of 8", _DAMAGED)
    begin = -(-reader.at // alignment) * alignment
    tensors = {name: Stored(shape, kind, begin + offset) for name, shape, kind, offset in table}
    if len(tensors) < count:
        raise UserError(f"{path}: {count} tensors have {len(tensors)} names", _DAMAGED)
    if odd := next((name for name, one in tensors.items() if (one.offset - begin) % alignment), None):
        raise UserError(f"{path}: tensor {odd} does not begin at a multiple of {alignment}", _DAMAGED)
    return Head(path, metadata, tensors)


class _Reader:
    """Reads one value after the other and never past the end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at = path, content, 0

    def bytes(self, size: int) -> bytes:
        if size > len(self.content) - self.at:
            raise UserError(f"{self.path}: {size:,} bytes wanted at {self.at:,} of {len(self.content):,}", _DAMAGED)
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return np.frombuffer(self.bytes(np.dtype(code).itemsize), code)[0].item()

    def string(self) -> str:
        stored = self.bytes(struct.unpack("<Q", self.bytes(8))[0])
        try:
            return stored.decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: {stored[:20]!r} is no UTF-8", _DAMAGED) from None

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise UserError(f"{self.path}: a value of the unknown type {kind} at {self.at:,}", _DAMAGED)
        kind, count = self.number("<u4"), self.number("<u8")
        if kind in _NUMBERS:
            return np.frombuffer(self.bytes(count * np.dtype(_NUMBERS[kind]).itemsize), _NUMBERS[kind]).tolist()
        if kind != _STRING:
            raise UserError(f"{self.path}: an array of the unknown type {kind} at {self.at:,}", _DAMAGED)
        return [self.string() for _ in range(count)]  # a wrong count ends at the end of the file

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.string(), self.number("<u4")
        if not 0 < axes <= _MAX_AXES:
            raise UserError(f"{self.path}: tensor {name} has {axes} axes", _DAMAGED)
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]
        if 0 in shape:
            raise UserError(f"{self.path}: tensor {name} has the shape {list(shape)}", _DAMAGED)
        return name, shape, self.number("<u4"), self.number("<u8")
