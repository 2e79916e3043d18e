"""One safetensors file: header of eight bytes of length and a JSON object, then the values without gaps.

    {"__metadata__": {"format": "pt"}, "a.weight": {"dtype": "BF16", "shape": [3, 5], "data_offsets": [0, 30]}, ...}

A file that is read is mapped and its header taken for a claim: sizes, offsets and names are checked against the file.
The library's writer wants every tensor in memory at once and its reader copies, so both are written out here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

from jaxlm.convert.files.stream import MappedBytes, Planned
from jaxlm.errors import UserError

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "bool": "BOOL"} | {
    f"{kind}int{bits}": f"{kind or 'i'}{bits}".upper() for kind in ("", "u") for bits in (8, 16, 32, 64)
}
"""Names of numpy and of the format. The format has more, for numbers of eight bits and fewer."""
NAMES = {code: name for name, code in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Longest header in bytes, as in the library."""
MAX_RANK, MAX_LENGTH = 8, 2**31
"""Most axes of a tensor, and the longest one."""


class Entry(NamedTuple):
    """What a header says of a tensor."""

    code: str
    shape: tuple[int, ...]
    start: int
    """Of its values, in bytes from the end of the header."""
    stop: int


class MappedFile:
    """A safetensors file, mapped: `read` returns views, and nothing is in memory before its values are looked at.

    Raises:
        UserError: the file is missing, truncated or damaged, or its header makes no sense.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file, though the index names it")
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                if length > MAX_HEADER:
                    raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER}")
                text = file.read(length)
                self._data = 8 + length
                self.header_sha256 = header_sha256(text)
                self.entries = _entries(text, size - self._data)
            self._map = MappedBytes.of(path)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: truncated or damaged: {error}", "copy or download it again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None

    def read(self, name: str) -> np.ndarray:
        """A tensor as a view of the file that cannot be written to.

        Raises:
            UserError: a type that numpy does not have.
        """
        code, shape, start, stop = self.entries[name]
        if code not in NAMES:
            raise UserError(f"{self.path}: cannot read tensor {name!r}: it is stored as {code}")
        values = np.frombuffer(self._map, np.uint8, stop - start, self._data + start)
        return values.view(NAMES[code]).reshape(shape)


def header(tensors: Sequence[Planned]) -> tuple[bytes, list[int]]:
    """The first bytes of a file with these tensors, and where in the file the values of each begin."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, stop = [], 0
    for one in tensors:
        starts.append(stop)
        stop += one.nbytes
        entries[one.name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": [starts[-1], stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


def header_sha256(text: bytes) -> str:
    """Of a header together with its length."""
    return hashlib.sha256(len(text).to_bytes(8, "little") + text).hexdigest()


def _entries(text: bytes, size: int) -> dict[str, Entry]:
    """The header of a file with `size` bytes of values. A ValueError says what is wrong with it."""
    stored = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(stored, dict):
        raise ValueError("the header is no JSON object")
    found = {name: _entry(name, entry) for name, entry in stored.items() if name != "__metadata__"}
    place = 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != place:
            raise ValueError(f"the values of {name!r} begin at {entry.start} instead of {place}")
        place = entry.stop
    if place != size:
        raise ValueError(f"the tensors take {place} bytes, the file has {size}")
    return found


def _entry(name: str, stored: Any) -> Entry:
    if not name.isprintable():
        raise ValueError(f"a tensor is named {name!r}")
    if not isinstance(stored, Mapping) or stored.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
    code, shape, offsets = stored["dtype"], stored["shape"], stored["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not isinstance(code, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name!r} is {code!r}, {shape!r} at {offsets!r}")
    if len(shape) > MAX_RANK or max(shape, default=0) > MAX_LENGTH:
        raise ValueError(f"{name!r} has the shape {shape}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the values of {name!r} are at {offsets}")
    size = math.prod(shape) * np.dtype(NAMES[code]).itemsize if code in NAMES else offsets[1] - offsets[0]
    if size != offsets[1] - offsets[0]:
        raise ValueError(f"{name!r}, {code} {shape}, takes {size} bytes and not {offsets[1] - offsets[0]}")
    return Entry(code, tuple(shape), *offsets)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found
