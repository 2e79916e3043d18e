"""Folders of weights: safetensors with a sha256 manifest, written whole or not at all, read one tensor at a time.

    write_folder("out", planned(native.to_torch(params, cfg)), {"config.toml": text}, layout="torch")
    tensors = read_folder("out")        # a Mapping of numpy arrays; nothing is read before it is asked for

`manifest.json` holds the size of each file, the sha256 of each file or, of weights, of its header, and sha256, dtype,
shape and file of each tensor. A tensor is compared with it when it is read for the first time. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxlm
from jaxlm.convert.files.safetensors_file import DTYPES, NAMES, Entry, MappedFile, header, header_sha256
from jaxlm.convert.files.stream import Planned, Target, planned, same_memory, sha256, write
from jaxlm.convert.tensors import Tensors
from jaxlm.errors import UserError

__all__ = ["Planned", "planned"]  # what is written, beside the functions of this file

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "jaxlm weights", 2  # version 1 had a sha256 of whole weight files
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Written(NamedTuple):
    """What `write_folder` wrote."""

    tensors: int
    bytes: int


class LazyTensors(Tensors):
    """The tensors of a folder; each access maps one of them, and the first one compares it with the manifest."""

    def __init__(
        self, folder: Path, files: Mapping[str, MappedFile], where: Mapping[str, str], digests: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self._files, self._where = files, where
        self._unverified = dict(digests)

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.unchecked(name)
        self.settle([name], tensor)
        return tensor

    def unchecked(self, name: str) -> np.ndarray:
        """See `Tensors`."""
        return self._files[self._where[name]].read(name)

    def settle(self, names: Sequence[str], array: np.ndarray, digest: str = "") -> None:
        """Compare tensors with the manifest, unless that is done; see `Tensors`."""
        for name in names:
            if wanted := self._unverified.get(name):
                stored = self.unchecked(name)
                found = digest if digest and same_memory(stored, array) else sha256(stored)
                if found != wanted:
                    file = self.folder / self._where[name]
                    raise UserError(f"{file}: tensor {name} differs from {MANIFEST}", "copy it again")
                self._unverified.pop(name, None)

    def shape(self, name: str) -> tuple[int, ...]:
        """From the header."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """From the header, by numpy's name."""
        code = self._entry(name).code
        return NAMES.get(code, code)

    def _entry(self, name: str) -> Entry:
        return self._files[self._where[name]].entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._where  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def without(self, names: Set[str]) -> LazyTensors:
        """The same tensors but for `names`."""
        where = {name: file for name, file in self._where.items() if name not in names}
        return LazyTensors(self.folder, self._files, where, self._unverified)


def write_folder(
    folder: str | Path,
    tensors: Iterable[Planned],
    files: Mapping[str, str | bytes],
    *,
    layout: str,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    report: Callable[[int], object] = lambda size: None,
) -> Written:
    """Write tensors, files and manifest; the folder appears complete or not at all.

    Args:
        layout: what the names mean (`torch`, `llama`); an earlier result in the same layout is replaced.
        shard_bytes: above this size the weights go into several files with an index; None: always one file.
        overwrite: replace whatever lies at `folder`.
        report: called with the bytes of each tensor that is written.

    Raises:
        UserError: something else lies at `folder`, it cannot be written, or the disk is full.
    """
    with staged(folder, overwrite or is_own(Path(folder), layout)) as stage:
        return write_weights(stage, tensors, files, layout=layout, shard_bytes=shard_bytes, report=report)


def write_weights(
    folder: Path,
    tensors: Iterable[Planned],
    files: Mapping[str, str | bytes],
    *,
    layout: str,
    shard_bytes: int | None = None,
    report: Callable[[int], object] = lambda size: None,
) -> Written:
    """Write tensors, files and manifest into an empty folder; see `write_folder`."""
    described, weights = _write_shards(folder, list(tensors), shard_bytes, report)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    others = sorted(path for path in folder.iterdir() if path.name not in described)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "jaxlm": jaxlm.__version__,
        "layout": layout,
        "files": described | {path.name: _describe(path) for path in others},
        "tensors": weights,
    }
    _write_json(folder / MANIFEST, manifest)
    return Written(len(weights), sum(entry["bytes"] for entry in manifest["files"].values()))


@contextlib.contextmanager
def staged(folder: str | Path, replace: bool) -> Iterator[Path]:
    """An empty sibling of `folder` that takes its place when the block ends well, and vanishes when it does not.

    Raises:
        UserError: `folder` exists, is not empty and `replace` is False; it cannot be written; the disk is full.
    """
    folder = Path(folder).resolve()
    _clear_up(folder)
    if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an earlier result of this conversion", "--overwrite replaces it")
    stage = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in (*stage.rglob("*"), stage):
            _flush(path)
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
    files = {name: MappedFile(folder / name) for name in names}
    digests = _verify(folder, files) if (folder / MANIFEST).is_file() else {}
    where = {tensor: name for name, file in files.items() for tensor in file.entries}
    if len(where) < sum(len(file.entries) for file in files.values()):
        name = next(tensor for one, file in files.items() for tensor in file.entries if where[tensor] != one)
        raise UserError(f"{folder}: tensor {name} is in several files", "which of them is right?")
    if index is not None and index != where:
        wrong = sorted(name for name in index.keys() | where.keys() if index.get(name) != where.get(name))
        raise UserError(
            f"{folder / INDEX}: the index and the files disagree on {len(wrong)} tensors, such as {wrong[0]}"
        )
    return LazyTensors(folder, files, where, digests)


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
    stage: Path, tensors: Sequence[Planned], shard_bytes: int | None, report: Callable[[int], object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One safetensors file, or several and their index; returns what the manifest says of each file and tensor.

    All headers are known ahead, so the tensors may come in any order, and a full disk shows before any work is done.
    """
    if sum(one.nbytes for one in tensors) > shutil.disk_usage(stage).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    shards: list[list[Planned]] = [[]]
    size = 0
    for one in tensors:
        if shards[-1] and shard_bytes is not None and size + one.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    described, targets, headers = {}, [], []
    with contextlib.ExitStack() as opened:
        for name, shard in zip(names, shards, strict=True):
            text, starts = header(shard)
            file = opened.enter_context((stage / name).open("wb", buffering=0))
            size = starts[-1] + shard[-1].nbytes if shard else len(text)
            file.truncate(size)
            headers.append((file, text))
            targets += [Target(one, file.fileno(), start) for one, start in zip(shard, starts, strict=True)]
            described[name] = {"header_sha256": header_sha256(text[8:]), "bytes": size}
        digests = write(targets, report)
        for file, text in headers:  # last, so that a file without all its values is none
            file.write(text)
    weights = {
        one.name: {"sha256": digests[one.name], "dtype": DTYPES[one.dtype], "shape": list(one.shape), "file": name}
        for name, shard in zip(names, shards, strict=True)
        for one in shard
    }
    if count > 1:
        total = sum(one.nbytes for one in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": {key: one["file"] for key, one in weights.items()}}
        _write_json(stage / INDEX, index)
    return described, weights


def _flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _clear_up(folder: Path) -> None:
    """Remove what conversions to `folder` left behind that were killed; put back a folder that one had just moved."""
    for left in folder.parent.iterdir() if folder.parent.is_dir() else ():
        found = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)\.(partial|old)", left.name)
        if not found or _alive(int(found[1])):
            continue
        if found[2] == "old" and not folder.exists():
            left.rename(folder)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def _swap(stage: Path, folder: Path) -> None:
    old = stage.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    stage.rename(folder)
    _flush(folder.parent)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise UserError(f"{path}: has no weight_map")
    for file in index.values():
        # Only plain names beside the index: a weight file must not be able to reach into other folders.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise UserError(f"{path}: {file!r} is not the name of a safetensors file in this folder")
    return index


def _verify(folder: Path, weights: Mapping[str, MappedFile]) -> dict[str, str]:
    """Compare everything but the values of tensors with the manifest; returns the sha256 of each tensor."""
    where = folder / MANIFEST
    manifest = read_json(where)
    if manifest.get("format") != FORMAT:
        return {}  # another program's file of this name
    version = manifest.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise UserError(f"{where}: format version {version!r}, this jaxlm reads 1 and {FORMAT_VERSION}")
    try:
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        digests = {
            name: entry["header_sha256" if name in weights else "sha256"]
            for name, entry in manifest["files"].items()
            if name not in weights or version > 1
        }
        tensors = {
            name: (entry["file"], Entry(entry["dtype"], tuple(entry["shape"]), 0, 0), entry["sha256"])
            for name, entry in manifest["tensors"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: not a manifest of jaxlm", "remove it to read the folder unchecked") from None
    if unlisted := sorted(weights.keys() - sizes.keys()):
        raise UserError(f"{folder / unlisted[0]}: {MANIFEST} does not list it", "which of the two was added?")
    for name, size in sizes.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise UserError(f"{path}: missing, though {MANIFEST} lists it")
        if path.stat().st_size != size:
            raise UserError(f"{path}: {path.stat().st_size} bytes where {MANIFEST} says {size}", "copy it again")
        if name in weights:
            listed = {key: entry for key, (file, entry, _) in tensors.items() if file == name}
            _same_tensors(weights[name], digests.get(name), listed)
        elif _describe(path)["sha256"] != digests[name]:
            raise UserError(f"{path}: sha256 differs from {MANIFEST}", "copy it again")
    return {name: digest for name, (_, _, digest) in tensors.items()}


def _same_tensors(file: MappedFile, digest: str | None, listed: Mapping[str, Entry]) -> None:
    """Compare the header of a weight file with the manifest."""
    found = {name: entry._replace(start=0, stop=0) for name, entry in file.entries.items()}
    wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
    if wrong:
        raise UserError(f"{file.path}: {MANIFEST} says something else of tensor {wrong[0]}", "copy it again")
    if digest not in (None, file.header_sha256):
        raise UserError(f"{file.path}: its header differs from {MANIFEST}", "copy it again")


def _no_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES) if folder.is_dir() else []
    if pickles:
        return UserError(
            f"{folder / pickles[0]}: a pickle can run any program when it is opened, jaxlm reads none",
            "save the model as safetensors where it comes from: save_pretrained(..., safe_serialization=True)",
        )
    return UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
