"""llama2.c's `model.bin`, read and written: the legacy layout, which run.c runs.

    int32  dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative: the head is separate), seq_len
    float32  token embedding, then of all layers: attention norms, wq, wk, wv, wo, feed-forward norms, w1, w2, w3;
             final norm, cosines and sines of the rotation, the head if it is separate

Weights are [out, in], little-endian. Rotary pairs are (2i, 2i + 1), as in Meta's Llama, the base is 10000 and eps 1e-5;
no file says so. Run.c skips the tables of the rotation. They differ in the last bit by the machine that made them, so
those of a file are kept as `ROPE_TABLES` where ours would not be the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import LLAMA2C
from jaxlm.convert.canonical import leaves
from jaxlm.convert.family import sizes
from jaxlm.convert.rows import Parameters, Row, Transform, expand, matrix, pairs_to_halves, plan
from jaxlm.convert.settings import always, require_same, tree
from jaxlm.convert.tensors import Tensors
from jaxlm.errors import UserError
from jaxlm.text import tokenizer_bin as vocabulary
from jaxlm.text.tokenizer import Tokenizer

NAME, MODEL, TOKENIZER, ROPE_TABLES = LLAMA2C, "model.bin", "tokenizer.bin", "llama2c_rope.f32"
HEADER: tuple[str, ...] = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
BYTES = 4 * len(HEADER)

THETA, EPS = 10000.0, 1e-5
SETTINGS = (
    *sizes(
        dim="d_model",
        hidden_dim="d_ff",
        n_layers="n_layers",
        n_heads="n_heads",
        n_kv_heads="n_kv_heads",
        vocab_size="vocab_size",
        seq_len="max_seq_len",
        tied="tie_embeddings",
    ),
    always("pattern", ["attention+mlp"]),
    always("activation", "swiglu"),
    always("norm", "rmsnorm"),
    always("norm_eps", EPS),
    always("rope_theta", THETA),
    always("rope_layout", "interleaved"),
)

halves_to_pairs = Transform(
    lambda xs, leaves: pairs_to_halves.back(xs, leaves, xs), lambda xs, leaves, like: pairs_to_halves.out(xs, leaves)
)
"""Last axis, a head: from rotary pairs (i, i + H/2) to (2i, 2i + 1)."""


def rows(cfg: config.Model) -> list[Row]:
    """In the order of the file; one tensor for each layer."""
    turn = () if cfg.rope_layout == "interleaved" else (halves_to_pairs,)
    ours = "layers.{i}"
    return [
        Row("embed.embedding", "token_embedding"),
        Row(f"{ours}.mixer_norm.scale", "rms_att.{i}"),
        Row(f"{ours}.mixer.q_proj.kernel", "wq.{i}", *turn, matrix),
        Row(f"{ours}.mixer.k_proj.kernel", "wk.{i}", *turn, matrix),
        Row(f"{ours}.mixer.v_proj.kernel", "wv.{i}", matrix),
        Row(f"{ours}.mixer.o_proj.kernel", "wo.{i}", matrix),
        Row(f"{ours}.ffn_norm.scale", "rms_ffn.{i}"),
        Row(f"{ours}.ffn.gate_proj.kernel", "w1.{i}", matrix),
        Row(f"{ours}.ffn.down_proj.kernel", "w2.{i}", matrix),
        Row(f"{ours}.ffn.up_proj.kernel", "w3.{i}", matrix),
        Row("final_norm.scale", "rms_final"),
        Row("head.kernel", "wcls", matrix),
    ]


def header_of(cfg: config.Model) -> list[int]:
    """The seven integers of a model.

    Raises:
        UserError: an option of `[model]` that the layout cannot express, by name.
    """
    header: dict[str, Any] = {}
    for setting in SETTINGS:
        header |= setting.out(cfg)
    try:
        back = _model(header, NAME)
    except UserError as error:
        raise UserError(f"the {NAME} layout has no place for this model: {error}") from None
    require_same(cfg, back, NAME)
    numbers = [header[name] for name in HEADER]
    if large := [name for name, number in zip(HEADER, numbers, strict=True) if number >= 2**31]:
        raise UserError(f"the {NAME} layout has no place for {large[0]} = {header[large[0]]}")
    return [*numbers[:5], numbers[5] if cfg.tie_embeddings else -numbers[5], numbers[6]]


def _model(header: Mapping[str, Any], where: str) -> config.Model:
    return toml.from_dict({"model": tree([setting.back(header) for setting in SETTINGS])}, where).model


def rope_tables(cfg: config.Model) -> np.ndarray:
    """Cosines and sines [2, seq_len, head_dim / 2], little-endian float32, of float32 angles as llama2.c has them."""
    frequencies = (1 / THETA ** (np.arange(0, cfg.head_dim, 2) / cfg.head_dim)).astype(np.float32)
    angles = np.outer(np.arange(cfg.max_seq_len, dtype=np.float32), frequencies).astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)]).astype("<f4")


class BinTensors(Tensors):
    """The tensors of a `model.bin`, by the names of `rows`; each access is a view of the mapped file."""

    def __init__(self, path: Path, cfg: config.Model) -> None:
        at, known = BYTES, leaves(cfg)
        self._where: dict[str, tuple[int, tuple[int, ...]]] = {}
        for row in expand(rows(cfg), cfg):
            ((name, shape),) = zip(row.theirs, row.shapes([known[mine] for mine in row.ours]), strict=True)
            self._where[name] = (at, shape)
            at += 4 * math.prod(shape)
            if name == "rms_final":
                self._tables = (at, (2, cfg.max_seq_len, cfg.head_dim // 2))
                at += 4 * math.prod(self._tables[1])
        self._file = np.memmap(path, np.uint8, "r")

    def _view(self, at: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.ndarray(shape, "<f4", self._file, at)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._view(*self._where[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header."""
        return self._where[name][1]

    def dtype(self, name: str) -> str:
        """Always the same."""
        return "float32"

    @property
    def tables(self) -> np.ndarray:
        """Cosines and sines of the file, [2, seq_len, head_dim / 2]."""
        return self._view(*self._tables)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class File(NamedTuple):
    """What a `model.bin` holds."""

    model: config.Model
    parameters: Parameters
    """By canonical names, each read when it is asked for."""
    kept: dict[str, bytes]
    """Files to keep beside the weights."""


def read(path: Path) -> File:
    """Open a `model.bin`.

    Raises:
        UserError: a pickle, another version of the format, sizes that contradict each other or the file, tables of
            another rotation.
    """
    with path.open("rb") as file:
        head = file.read(BYTES)
    _refuse_others(path, head)
    numbers = dict(zip(HEADER, struct.unpack(f"<{len(HEADER)}i", head), strict=True))
    if problem := _inconsistent(numbers, path.stat().st_size):
        listed = ", ".join(f"{name} {number}" for name, number in numbers.items())
        raise UserError(f"{path}: {problem}: {listed}", "no model.bin of llama2.c, or a damaged one")
    tied = numbers["vocab_size"] > 0
    cfg = _model({**numbers, "vocab_size": abs(numbers["vocab_size"]), "tied": tied}, str(path))
    tensors = BinTensors(path, cfg)
    return File(cfg, Parameters(tensors, cfg, rows(cfg), str(path)), _kept(path, tensors.tables, cfg))


def _refuse_others(path: Path, head: bytes) -> None:
    # A width of 640 begins as a pickle of protocol 2 does, \x80\x02, but then come two zeros.
    if head[:2] == b"PK" or (head[:1] == b"\x80" and 2 <= head[1] <= 5 and any(head[2:4])):
        raise UserError(
            f"{path}: a pickle can run any program when it is opened, jaxlm reads none",
            "save the model as safetensors where it comes from: save_pretrained(..., safe_serialization=True)",
        )
    if len(head) < BYTES:
        raise UserError(f"{path}: {len(head)} bytes are no header of llama2.c, which has {BYTES}")
    if head[:4] == b"24ka":
        raise UserError(
            f"{path}: version {struct.unpack_from('<i', head, 4)[0]} of llama2.c's format, jaxlm reads the legacy one",
            "export.py --version 0 writes it",
        )


def _inconsistent(numbers: Mapping[str, int], size: int) -> str:
    """What is wrong with a header, or with the size of its file; empty when nothing is."""
    d, f, layers, n, k, v, t = (numbers[name] for name in HEADER)
    if min(d, f, layers, n, k, abs(v), t) < 1:
        return "a size is not positive"
    if d % n or d // n % 2:
        return "dim is no even multiple of n_heads"
    if n % k:
        return "n_heads is no multiple of n_kv_heads"
    kv = d // n * k
    needed = BYTES + 4 * (
        abs(v) * d * (1 if v > 0 else 2) + layers * (2 * d * (d + kv + 1) + 3 * d * f) + d + t * d // n
    )
    if size != needed:
        return f"{'truncated' if size < needed else 'too long'}, {size:,} bytes where the header needs {needed:,}"
    return ""


def _kept(path: Path, tables: np.ndarray, cfg: config.Model) -> dict[str, bytes]:
    """The tables of a file where ours would be other bytes; all zeros say nothing, another rotation is refused."""
    ours = rope_tables(cfg)
    bound = cfg.max_seq_len * 2.0**-22  # some roundings of the largest angle
    far = ~(np.abs(tables - ours) <= bound)  # NaN too
    if far.any() and tables.any():
        half, place, pair = (int(i) for i in np.argwhere(far)[0])
        raise UserError(
            f"{path}: {('cosine', 'sine')[half]} {pair} of position {place} is {tables[half, place, pair]}, "
            f"of the base {THETA:g} it is {ours[half, place, pair]}",
            "the model rotates otherwise than run.c, or the file is damaged",
        )
    return {} if tables.tobytes() == ours.tobytes() else {ROPE_TABLES: tables.tobytes()}


def find_tokenizer(path: Path, vocab_size: int) -> Path | None:
    """The vocabulary of this size beside a `model.bin`."""
    for name in (TOKENIZER, f"tok{vocab_size}.bin"):
        if (path.parent / name).is_file() and len(vocabulary.read(path.parent / name)) == vocab_size:
            return path.parent / name
    return None


def tokenizer_bin(path: Path, vocab_size: int) -> bytes:
    """The tokenizer at `path` as run.c reads it: as many pieces as the model has, and `<s>` before every text.

    Raises:
        UserError: it is no vocabulary that llama2.c can hold, or of another size, or puts nothing before a text.
    """
    tokenizer = Tokenizer.from_file(path)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size} ids, the model has {vocab_size}, run.c reads as many of both")
    stored = vocabulary.from_json(json.loads(tokenizer.to_json()), str(path))
    if tokenizer.bos != vocabulary.BOS:
        raise UserError(f"{path}: no <s> stands before a text, run.c always writes one", "has it a post_processor?")
    return stored


def write(
    stage: Path,
    parameters: Mapping[str, Any],
    cfg: config.Model,
    kept: bytes | None,
    report: Callable[[int], object] = lambda size: None,
) -> tuple[int, int]:
    """Write `model.bin` into a folder; returns the number of tensors and bytes. `kept`: tables that a file had.

    Raises:
        UserError: what the layout cannot express, float64 parameters, a parameter that is damaged.
    """
    numbers, tensors = header_of(cfg), list(plan(parameters, cfg, rows(cfg)))
    if wide := [one for one in tensors if one.dtype == "float64"]:
        raise UserError(f"the {NAME} layout has no place for {wide[0].dtype}, the dtype of {wide[0].name}")
    tables = rope_tables(cfg).tobytes()
    with (stage / MODEL).open("wb") as file:
        file.write(struct.pack(f"<{len(numbers)}i", *numbers))
        for one in tensors:
            array = np.ascontiguousarray(one.make(), "<f4")
            if not np.isfinite(array).all():
                raise UserError(f"{one.name} is NaN or infinite somewhere")
            file.write(array.data)
            if one.name == "rms_final":
                file.write(kept if kept is not None and len(kept) == len(tables) else tables)
            report(one.nbytes)
        return len(tensors), file.tell()


def settings(model: config.Model, tokenizer: Path | None) -> config.Config:
    """The config of a `model.bin`."""
    found = config.Tokenizer(kind="file", path=str(tokenizer)) if tokenizer else config.Tokenizer()
    return dataclasses.replace(config.Config(), model=model, tokenizer=found)
