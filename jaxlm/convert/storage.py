"""Folders of weights: safetensors with a sha256 manifest, written whole or not at all, read one tensor at a time.

    write_folder("out", planned(native.to_torch(params, cfg)), {"config.toml": text}, layout="torch")
    tensors = read_folder("out")        # a Mapping of numpy arrays; nothing is read before it is asked for

`manifest.json` holds sha256 and size of each file, and sha256, dtype, shape and file of each tensor. Nothing is ever
unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

import jaxlm
from jaxlm.errors import UserError

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "jaxlm weights", 1
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Planned(NamedTuple):
    """A tensor that is yet to be made."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]
    """A view where nothing needs to be copied."""

    @property
    def nbytes(self) -> int:
        """Of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def planned(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[Planned]:
    """Tensors that are there already."""
    for name, array in tensors:
        yield Planned(name, array.shape, array.dtype.name, lambda array=array: array)


class Written(NamedTuple):
    """What `write_folder` wrote."""

    tensors: int
    bytes: int


class LazyTensors(Mapping[str, np.ndarray]):
    """The tensors of a folder; each access reads one of them from the mapped file."""

    def __init__(self, folder: Path, files: Mapping[str, Any], where: Mapping[str, str]) -> None:
        self.folder = folder
        self._files = files
        self._where = where

    def __getitem__(self, name: str) -> np.ndarray:
        import safetensors

        file = self._where[name]
        try:
            return self._files[file].get_tensor(name)
        except (safetensors.SafetensorError, TypeError, AttributeError) as error:  # a dtype that numpy has not
            raise UserError(f"{self.folder / file}: cannot read tensor {name!r}: {error}") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header."""
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """From the header, by numpy's name."""
        stored = self._files[self._where[name]].get_slice(name).get_dtype()
        return next((mine for mine, theirs in DTYPES.items() if theirs == stored), stored)

    def __contains__(self, name: object) -> bool:
        return name in self._where  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def without(self, names: Set[str]) -> LazyTensors:
        """The same tensors but for `names`."""
        where = {name: file for name, file in self._where.items() if name not in names}
        return LazyTensors(self.folder, self._files, where)


def write_folder(
    folder: str | Path,
    tensors: Iterable[Planned],
    files: Mapping[str, str | bytes],
    *,
    layout: str,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    told: Callable[[int], object] = lambda size: None,
) -> Written:
    """Write tensors, files and manifest; the folder appears complete or not at all.

    Args:
        layout: what the names mean (`torch`, `llama`); an earlier result in the same layout is replaced.
        shard_bytes: above this size the weights go into several files with an index; None: always one file.
        overwrite: replace whatever lies at `folder`.
        told: called with the bytes of each tensor that is written.

    Raises:
        UserError: something else lies at `folder`, it cannot be written, or the disk is full.
    """
    with staged(folder, overwrite or is_own(Path(folder), layout)) as stage:
        weights = _write_shards(stage, tensors, shard_bytes, told)
        for name, content in files.items():
            (stage / name).write_bytes(content.encode() if isinstance(content, str) else content)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "jaxlm": jaxlm.__version__,
            "layout": layout,
            "files": {path.name: _describe(path) for path in sorted(stage.iterdir())},
            "tensors": weights,
        }
        _write_json(stage / MANIFEST, manifest)
        return Written(len(weights), sum(entry["bytes"] for entry in manifest["files"].values()))


@contextlib.contextmanager
def staged(folder: str | Path, replace: bool) -> Iterator[Path]:
    """An empty sibling of `folder` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `folder` exists, is not empty and `replace` is False; it cannot be written; the disk is full.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an earlier result of this conversion", "--overwrite replaces it")
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        stage.mkdir(parents=True)
        yield stage
        _swap(stage, folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full, nothing was kept" if full else f"cannot be written: {error.strerror}"
        raise UserError(f"{folder}: {reason}", "free some space or name another place" if full else "") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_own(folder: Path, layout: str) -> bool:
    """Whether `write_folder` made this folder in this layout, and nobody has put anything else into it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        mine = manifest["format"] == FORMAT and manifest["layout"] == layout
        return mine and {path.name for path in folder.iterdir()} <= {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_folder(folder: str | Path) -> LazyTensors:
    """Open the weights of a folder, after checking every header against its file and, if there is one, the manifest.

    Raises:
        UserError: no safetensors, a damaged file, an index that lies or points elsewhere, a sha256 that differs.
    """
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        index = None
        names = [SINGLE]
    elif (folder / INDEX).is_file():
        index = _read_index(folder / INDEX)
        names = sorted(set(index.values()))
    else:
        raise _no_weights(folder)
    if (folder / MANIFEST).is_file():
        _verify(folder, names)
    files = {name: _open(folder / name) for name in names}
    where = {tensor: name for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118 (no dict)
    if index is not None and index != where:
        wrong = sorted(name for name in index.keys() | where.keys() if index.get(name) != where.get(name))
        raise UserError(
            f"{folder / INDEX}: the index and the files disagree on {len(wrong)} tensors, such as {wrong[0]}"
        )
    return LazyTensors(folder, files, where)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _write_shards(
    stage: Path, tensors: Iterable[Planned], shard_bytes: int | None, told: Callable[[int], object]
) -> dict[str, dict[str, Any]]:
    """One safetensors file, or several and their index; returns what the manifest says of each tensor."""
    shards: list[list[Planned]] = [[]]
    for one in tensors:
        if shards[-1] and shard_bytes is not None and sum(t.nbytes for t in shards[-1]) + one.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(one)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weights = {}
    for name, shard in zip(names, shards, strict=True):
        entries = _write_safetensors(stage / name, shard, told)
        weights |= {key: {**entry, "file": name} for key, entry in entries.items()}
    if count > 1:
        total = sum((stage / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": {key: one["file"] for key, one in weights.items()}}
        _write_json(stage / INDEX, index)
    return weights


def _write_safetensors(
    path: Path, tensors: Iterable[Planned], told: Callable[[int], object]
) -> dict[str, dict[str, Any]]:
    """Write one file, one tensor after the other.

    The library's writer wants every tensor contiguous in memory at once, a second copy of the model.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for one in tensors:
        ends = [offset, offset := offset + one.nbytes]
        header[one.name] = {"dtype": DTYPES[one.dtype], "shape": list(one.shape), "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    entries = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            tensor = np.ascontiguousarray(one.make())
            file.write(_bytes(tensor))
            entries[one.name] = {"sha256": _sha256(tensor), "dtype": DTYPES[one.dtype], "shape": list(one.shape)}
            told(tensor.nbytes)
    return entries


def _bytes(tensor: np.ndarray) -> memoryview:
    return tensor.reshape(-1).view(np.uint8).data


def _sha256(tensor: np.ndarray) -> str:
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _swap(stage: Path, folder: Path) -> None:
    old = stage.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    stage.rename(folder)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _open(path: Path) -> Any:
    """Map a safetensors file; the library checks that header, offsets and shapes cover the file exactly."""
    import safetensors

    if not path.is_file():
        raise UserError(f"{path}: no such file, though the index names it")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: truncated or damaged: {error}", "copy or download it again") from None


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{path}: has no weight_map")
    for file in index.values():
        # Only plain names beside the index: a weight file must not be able to reach into other folders.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise UserError(f"{path}: {file!r} is not the name of a safetensors file in this folder")
    return index


def _verify(folder: Path, needed: Iterable[str]) -> None:
    """Compare every file with the manifest; a damaged weight file is searched for the tensors that differ."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        return  # another program's file of this name
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise UserError(f"{folder / MANIFEST}: format version {version!r}, this jaxlm reads {FORMAT_VERSION}")
    try:
        listed = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
        weights = {
            name: (entry["file"], entry["sha256"], entry["dtype"], entry["shape"])
            for name, entry in manifest["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            f"{folder / MANIFEST}: not a manifest of jaxlm", "remove it to read the folder unchecked"
        ) from None
    if unlisted := sorted(set(needed) - listed.keys()):
        raise UserError(f"{folder / unlisted[0]}: {MANIFEST} does not list it", "which of the two was added?")
    for name, (digest, size) in listed.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path}: missing, though {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise UserError(f"{path}: {path.stat().st_size} bytes where {MANIFEST} says {size}", "copy it again")
        if _describe(path)["sha256"] != digest:
            tensors = {tensor: entry[1:] for tensor, entry in weights.items() if entry[0] == name}
            raise UserError(f"{path}: sha256 differs from {MANIFEST}{_differing(path, tensors)}", "copy it again")


def _differing(path: Path, tensors: Mapping[str, tuple[str, str, list[int]]]) -> str:
    """Which tensors of a damaged weight file differ, for the message."""
    if not tensors:
        return ""
    file = _open(path)
    stored, found = set(file.keys()), []
    for name, (digest, dtype, shape) in tensors.items():
        if name not in stored:
            found.append(name)
            continue
        part = file.get_slice(name)
        if (part.get_dtype(), part.get_shape()) != (dtype, shape) or _sha256(file.get_tensor(name)) != digest:
            found.append(name)
    return f", tensors {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else ", no tensor of it does"


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return UserError(
            f"{folder / pickles[0]}: a pickle can run any program when it is opened, jaxlm reads none",
            "save the model as safetensors where it comes from: save_pretrained(..., safe_serialization=True)",
        )
    return UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
