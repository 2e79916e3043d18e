"""The file of a golden model: JSON in gzip, the same bytes for the same content.

It holds numbers and names only. Sizes are checked while it is read, and nothing in it is ever run.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from pydantic.dataclasses import dataclass

from jaxlm.errors import UserError
from jaxlm.parity.golden.projection import PROJECTIONS, Sketch
from jaxlm.parity.inputs import Inputs

FORMAT, VERSION = "jaxlm golden", 1
LARGEST = 1 << 28
"""Bytes of the JSON text: a model of a hundred layers takes some megabytes."""
_STRICT = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)
_COLUMNS = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32, "weights": np.float32}

Rows = dict[str, list[list[float]]]
Numbers = dict[str, dict[str, dict[str, float]]]
"""By dtype, level and name."""


@dataclass(frozen=True, config=_STRICT)
class Shown:
    """What the model was shown; see `inputs.Inputs`."""

    text: str
    rows: Rows
    step_rows: Rows
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    stream: tuple[int, ...]
    vocab_size: int

    @classmethod
    def of(cls, inputs: Inputs) -> Shown:
        """Plain numbers of these inputs."""
        rows, step_rows = (
            {name: array.tolist() for name, array in one.items()} for one in (inputs.rows, inputs.step_rows)
        )
        stream = tuple(inputs.stream.tolist())
        return cls(inputs.text, rows, step_rows, inputs.prompts, inputs.new_tokens, stream, inputs.vocab_size)

    def inputs(self) -> Inputs:
        """The inputs that were frozen.

        Raises:
            ValueError, KeyError: they are no rows of tokens.
        """
        rows, step_rows = (
            {name: np.array(one[name], dtype) for name, dtype in _COLUMNS.items()}
            for one in (self.rows, self.step_rows)
        )
        # The file may come from anywhere. Rows of several shapes or ids outside the vocabulary would fail deep inside a
        # model, with a message about anything but the file.
        for one in (rows, step_rows):
            if len({array.shape for array in one.values()}) != 1 or one["tokens"].ndim != 2:
                raise ValueError("its rows have several shapes")
        ids = [*rows["tokens"].flat, *step_rows["tokens"].flat, *self.stream, *(i for p in self.prompts for i in p)]
        if min(ids) < 0 or max(ids) >= self.vocab_size or not all(self.prompts):
            raise ValueError("its tokens lie outside the vocabulary")
        stream = np.array(self.stream, np.int32)
        return Inputs(rows, step_rows, self.prompts, self.new_tokens, self.text, stream, self.vocab_size)


@dataclass(frozen=True, config=_STRICT)
class Golden:
    """The behaviour of a model."""

    computed_by: str
    model: str
    """Its architecture, in words."""
    versions: dict[str, str]
    """Of what computed the numbers."""
    config: dict[str, Any]
    """Every option that decides them, by its full name."""
    shown: Shown
    weights: dict[str, tuple[str, Sketch]]
    """The sha256 of the float64 values of each parameter, and its sketch."""
    levels: dict[str, dict[str, Sketch]]
    """In float64: by level and name, in the order of computation."""
    tail: tuple[float, ...]
    """The last logits of the last token, in float64."""
    tokens: dict[str, tuple[tuple[int, ...], ...]]
    """By dtype, the greedy continuation of each prompt."""
    bounds: Numbers
    """Below float64: how far from float64 a value may lie, twice as far as it did."""
    typical: dict[str, dict[str, float]]
    """Below float64: by dtype and parameter, the median error of the gradient over other draws of rows."""

    def __post_init__(self) -> None:
        for sketches in (*self.levels.values(), {name: one for name, (_, one) in self.weights.items()}):
            # A sketch of fewer values than its shape asks for would compare fewer, and so hide differences.
            for name, (shape, _, values) in sketches.items():
                if len(values) != min(int(np.prod(shape, dtype=object)), PROJECTIONS):
                    raise ValueError(f"the sketch of {name} has {len(values)} values")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The widest first."""
        return tuple(self.tokens)

    def save(self, path: str | Path) -> int:
        """Write the file, whole or not at all; returns its size in bytes.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(path)
        content = {"format": FORMAT, "version": VERSION, **_ADAPTER.dump_python(self, mode="json")}
        # No time stamp in the archive: the same content gives the same bytes, so version control sees a change only if
        # there is one.
        packed = gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0)
        # Written beside and renamed: a reader sees the old file or the new one, never a part.
        stage = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stage.write_bytes(packed)
            stage.replace(path)
        except OSError as error:
            raise UserError(f"{path}: golden file not written: {error.strerror or error}") from error
        finally:
            stage.unlink(missing_ok=True)
        return len(packed)


_ADAPTER = pydantic.TypeAdapter(Golden)


def read_golden(path: str | Path) -> Golden:
    """Read a golden file.

    Raises:
        UserError: it is missing, damaged, too large, no golden file, or of a newer jaxlm.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no golden file", f"jaxlm parity MODEL --golden write {path}")
    try:
        with gzip.open(path) as file:
            # A few kilobytes of gzip can unpack to gigabytes: no more is read than one byte above the limit.
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MB")
        content = json.loads(text)
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as a golden file: {error}", "write it again with --golden write"
        ) from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: not a golden file of jaxlm")
    if (version := content.pop("version", None)) != VERSION:
        raise UserError(f"{path}: golden format {version!r}, this jaxlm reads {VERSION}", "update jaxlm")
    try:
        golden = _ADAPTER.validate_python(content)
        golden.shown.inputs()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged golden file: {where}: {first['msg']}".replace(": :", ":")) from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged golden file: {error}") from None
    return golden
