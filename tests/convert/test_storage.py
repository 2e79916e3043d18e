"""Folders of weights: whole or absent, checked before they are read, never unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.convert.files.safetensors_file import MappedFile
from jaxlm.convert.files.storage import INDEX, MANIFEST, SINGLE, planned, read_folder, write_folder
from jaxlm.errors import UserError


def tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32).T,  # a view that is not contiguous
        "b.weight": rng.standard_normal((4, 2)).astype(ml_dtypes.bfloat16),
        "c.bias": rng.standard_normal(7).astype(np.float16),
        "d": np.array(3.5),
        "e": np.zeros((0, 4), np.float32),
    }


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    write_folder(tmp_path / "w", planned(tensors(rng).items()), {"config.toml": "x = 1\n"}, layout="torch")
    return tmp_path / "w"


@pytest.fixture
def shards(tmp_path: Path, rng: np.random.Generator) -> Path:
    write_folder(tmp_path / "w", planned(tensors(rng).items()), {}, layout="llama", shard_bytes=70)
    return tmp_path / "w"


def refusal(folder: Path) -> str:
    """What reading the folder, every tensor of it, is refused with."""
    with pytest.raises(UserError) as caught:
        dict(read_folder(folder))
    assert "\n" not in str(caught.value)
    return caught.value.message


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def reheader(path: Path, change: Callable[[dict], Any]) -> None:
    """Change the header of a safetensors file, and nothing else."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def test_the_library_reads_the_same(folder: Path) -> None:
    found, library = read_folder(folder), safetensors.numpy.load_file(folder / SINGLE)
    assert list(found) and found.keys() == library.keys()
    for name, tensor in found.items():
        assert tensor.dtype == library[name].dtype and tensor.tobytes() == library[name].tobytes()


@pytest.mark.parametrize("shard_bytes", [None, 1, 70, 10**9])
def test_bits_survive(tmp_path: Path, rng: np.random.Generator, shard_bytes: int | None) -> None:
    wanted = tensors(rng)
    written = write_folder(
        tmp_path / "w", planned(wanted.items()), {"note": b"\0"}, layout="x", shard_bytes=shard_bytes
    )
    assert written.tensors == len(wanted)
    assert written.bytes == sum(p.stat().st_size for p in (tmp_path / "w").iterdir() if p.name != MANIFEST)
    found = read_folder(tmp_path / "w")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()
    assert ((tmp_path / "w" / INDEX).exists()) == (shard_bytes in (1, 70))


def test_manifest(folder: Path, rng: np.random.Generator) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["files"].keys() == {SINGLE, "config.toml"}
    text = (folder / "config.toml").read_bytes()
    assert manifest["files"]["config.toml"] == {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    data = (folder / SINGLE).read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert manifest["files"][SINGLE] == {"header_sha256": hashlib.sha256(header).hexdigest(), "bytes": len(data)}
    for name, tensor in read_folder(folder).items():
        entry = manifest["tensors"][name]
        assert (entry["file"], entry["shape"]) == (SINGLE, list(tensor.shape))
        assert entry["sha256"] == hashlib.sha256(tensor.tobytes()).hexdigest()
    assert manifest["jaxlm"] and manifest["format_version"] == 2
    with safetensors.safe_open(folder / SINGLE, "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_damage_is_found_with_the_manifest(folder: Path) -> None:
    flip(folder / SINGLE, -1 - 2)  # a byte of d, the last tensor with any
    assert refusal(folder) == f"{folder / SINGLE}: tensor d differs from {MANIFEST}"


def test_a_damaged_text_file_is_found(folder: Path) -> None:
    (folder / "config.toml").write_text("x = 2\n")
    assert refusal(folder) == f"{folder / 'config.toml'}: sha256 differs from {MANIFEST}"


def test_a_wrong_digest_in_the_manifest_is_found(folder: Path) -> None:
    whole = (folder / MANIFEST).read_text()
    manifest = json.loads(whole)
    manifest["files"][SINGLE]["header_sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert refusal(folder) == f"{folder / SINGLE}: its header differs from {MANIFEST}"
    manifest = json.loads(whole)
    manifest["tensors"]["c.bias"]["sha256"] = "0" * 64
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert refusal(folder) == f"{folder / SINGLE}: tensor c.bias differs from {MANIFEST}"


def test_a_tensor_is_compared_once_and_only_when_it_is_read(folder: Path) -> None:
    flip(folder / SINGLE, -1 - 2)
    found = read_folder(folder)
    assert found["a.weight"].shape == (5, 3)
    for _ in range(2):
        with pytest.raises(UserError, match="tensor d differs"):
            found["d"]


def test_the_manifest_of_version_1_is_read(folder: Path, rng: np.random.Generator) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = hashlib.sha256((folder / SINGLE).read_bytes()).hexdigest()
    manifest["files"][SINGLE] = {"sha256": digest, "bytes": (folder / SINGLE).stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 1}))
    assert dict(read_folder(folder)).keys() == tensors(rng).keys()
    flip(folder / SINGLE, -1 - 2)
    assert refusal(folder) == f"{folder / SINGLE}: tensor d differs from {MANIFEST}"


def test_a_changed_type_is_found(folder: Path) -> None:
    reheader(folder / SINGLE, lambda header: header["b.weight"].update(dtype="F16"))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][SINGLE]["bytes"] = (folder / SINGLE).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert refusal(folder) == f"{folder / SINGLE}: {MANIFEST} says something else of tensor b.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].pop(SINGLE), f"{SINGLE}: {MANIFEST} does not list it"),
        (
            lambda m: m["files"].update(gone=m["files"]["config.toml"]),
            f"gone: missing, though {MANIFEST} lists it",
        ),
        (
            lambda m: m["files"].update({"../x": m["files"]["config.toml"]}),
            f"../x: missing, though {MANIFEST} lists it",
        ),
        (lambda m: m["files"][SINGLE].update(bytes=7), f"bytes where {MANIFEST} says 7"),
        (lambda m: m.update(format_version=99), f"{MANIFEST}: format version 99, this jaxlm reads 1 and 2"),
        (lambda m: m["tensors"].pop("d"), f"{MANIFEST} says something else of tensor d"),
        (lambda m: m.update(files=[]), f"{MANIFEST}: not a manifest of jaxlm"),
    ],
)
def test_a_bad_manifest_is_refused(folder: Path, change: Callable[[dict], Any], message: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert message in refusal(folder)


def test_a_manifest_of_another_program_is_ignored(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"name": "web app"}')
    assert len(read_folder(folder)) == 5


_NONE = '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
TWICE = (2 * len(_NONE) + 3).to_bytes(8, "little") + f"{{{_NONE},{_NONE}}}".encode()
DAMAGE: list[tuple[str, Callable[[Path], Any]]] = [
    ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    ("one byte too many", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    ("empty", lambda path: path.write_bytes(b"")),
    ("half a header", lambda path: path.write_bytes(path.read_bytes()[:50])),
    ("no JSON", lambda path: flip(path, 8)),
    ("header longer than the file", lambda path: path.write_bytes((10**6).to_bytes(8, "little") + b"{}")),
    ("header of 10^18 bytes", lambda path: path.write_bytes((10**18).to_bytes(8, "little") + b"{}")),
    ("shape too large", lambda path: reheader(path, lambda h: h["a.weight"].update(shape=[500, 3]))),
    ("offsets outside", lambda path: reheader(path, lambda h: h["d"].update(data_offsets=[0, 10**9]))),
    (
        "overlap",
        lambda path: reheader(path, lambda h: h["b.weight"].update(data_offsets=h["a.weight"]["data_offsets"])),
    ),
    ("header of 10^8 bytes", lambda path: path.write_bytes((10**8 + 1).to_bytes(8, "little") + b"{}" * 50_000_001)),
    ("negative offsets", lambda path: reheader(path, lambda h: h["a.weight"].update(data_offsets=[-60, 0]))),
    ("offsets the wrong way", lambda path: reheader(path, lambda h: h["e"].update(data_offsets=[142, 134]))),
    ("offsets of text", lambda path: reheader(path, lambda h: h["d"].update(data_offsets=["0", "8"]))),
    ("a negative shape", lambda path: reheader(path, lambda h: h["a.weight"].update(shape=[-5, -3]))),
    ("an endless shape", lambda path: reheader(path, lambda h: h["e"].update(shape=[0, 2**62]))),
    ("no shape", lambda path: reheader(path, lambda h: h["d"].pop("shape"))),
    ("a type that is none", lambda path: reheader(path, lambda h: h["d"].update(dtype=7))),
    ("a type of another size", lambda path: reheader(path, lambda h: h["d"].update(dtype="BF16"))),
    ("a name of two lines", lambda path: reheader(path, lambda h: h.update({"d\n": h.pop("d")}))),
    ("a list", lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]")),
    ("nested too deep", lambda path: path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)),
    ("a name that is there twice", lambda path: path.write_bytes(TWICE)),
    ("a hole", lambda path: reheader(path, lambda h: h.pop("b.weight"))),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[name for name, _ in DAMAGE])
def test_a_damaged_file_is_named(folder: Path, name: str, damage: Callable[[Path], Any]) -> None:
    (folder / MANIFEST).unlink()
    damage(folder / SINGLE)
    assert refusal(folder).startswith(f"{folder / SINGLE}: truncated or damaged: ")


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, 10**6))
def test_no_change_of_one_byte_passes_the_manifest(at: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("w") / "w"
    write_folder(folder, planned([("a", np.arange(6, dtype=np.float32))]), {}, layout="x")
    size = (folder / SINGLE).stat().st_size
    flip(folder / SINGLE, at % size)
    refusal(folder)


@pytest.mark.parametrize(
    "name", ["../w/x.safetensors", "/etc/x.safetensors", "..", "a\\b.safetensors", "pytorch.bin", 7]
)
def test_an_index_cannot_point_elsewhere(shards: Path, name: Any) -> None:
    (shards / MANIFEST).unlink()
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["a.weight"] = name
    (shards / INDEX).write_text(json.dumps(index))
    assert refusal(shards) == f"{shards / INDEX}: {name!r} is not the name of a safetensors file in this folder"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("b.weight"), "the index and the files disagree on 1 tensors, such as b.weight"),
        (lambda m: m.update(ghost=m["d"]), "the index and the files disagree on 1 tensors, such as ghost"),
        (lambda m: m.clear(), "has no weight_map"),
        (lambda m: m.update(d="model-9.safetensors"), "model-9.safetensors: no such file, though the index names it"),
    ],
)
def test_an_index_that_lies_is_refused(shards: Path, change: Callable[[dict], Any], message: str) -> None:
    (shards / MANIFEST).unlink()
    index = json.loads((shards / INDEX).read_text())
    change(index["weight_map"])
    (shards / INDEX).write_text(json.dumps(index))
    assert message in refusal(shards)


def test_a_tensor_in_two_files_is_refused(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    index = json.loads((shards / INDEX).read_text())["weight_map"]
    (shards / index["a.weight"]).write_bytes((shards / index["d"]).read_bytes())
    assert refusal(shards).startswith(f"{shards}: tensor ") and refusal(shards).endswith(" is in several files")


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F4", "C64"])
def test_numbers_that_numpy_does_not_have_are_named(folder: Path, code: str) -> None:
    (folder / MANIFEST).unlink()
    reheader(folder / SINGLE, lambda header: header["d"].update(dtype=code))
    found = read_folder(folder)
    assert found.dtype("d") == code and found["a.weight"].shape == (5, 3)
    assert refusal(folder) == f"{folder / SINGLE}: cannot read tensor 'd': it is stored as {code}"


def test_whole_numbers_pass(tmp_path: Path) -> None:
    dtypes = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
    wanted = {dtype: np.arange(3).astype(dtype) for dtype in dtypes}
    wanted["bool"] = np.array([True, False])
    write_folder(tmp_path / "w", planned(wanted.items()), {}, layout="x")
    found, library = read_folder(tmp_path / "w"), safetensors.numpy.load_file(tmp_path / "w" / SINGLE)
    for name, array in wanted.items():
        assert found.dtype(name) == found[name].dtype == library[name].dtype == array.dtype
        assert found[name].tolist() == library[name].tolist() == array.tolist()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / name}: a pickle can run any program when it is opened")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: holds neither {SINGLE} nor {INDEX}"


def failing(rng: np.random.Generator, error: BaseException) -> Iterator[tuple[str, np.ndarray]]:
    yield "a", rng.standard_normal(9)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("bad"), ValueError("bad")])
def test_an_interrupted_writing_leaves_nothing(tmp_path: Path, rng: np.random.Generator, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write_folder(tmp_path / "w", planned(failing(rng, error)), {}, layout="x", shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writing_keeps_the_old_folder(folder: Path, rng: np.random.Generator) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, planned(failing(rng, KeyboardInterrupt())), {}, layout="torch")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_a_full_disk_is_one_line(tmp_path: Path, rng: np.random.Generator) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a write beyond 1000 bytes fails in the system call
    try:
        with pytest.raises(UserError, match="the disk is full, nothing was kept"):
            write_folder(tmp_path / "w", planned([("a", rng.standard_normal(1000))]), {}, layout="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "text"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written: Permission denied")]
)
def test_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str) -> None:
    import os

    def refuse(path: Path, **_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=text):
        write_folder(tmp_path / "w", [], {}, layout="x")


def test_only_its_own_kind_is_replaced(folder: Path, rng: np.random.Generator) -> None:
    pairs = [("z", np.ones(2, np.float32))]
    write_folder(folder, planned(pairs), {}, layout="torch")
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, SINGLE]
    with pytest.raises(UserError, match="not an earlier result of this conversion"):
        write_folder(folder, planned(pairs), {}, layout="llama")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an earlier result of this conversion"):
        write_folder(folder, planned(pairs), {}, layout="torch")
    assert (folder / "notes.txt").exists()
    write_folder(folder, planned(pairs), {}, layout="llama", overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_an_empty_folder_is_filled_and_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", planned([("z", np.ones(2, np.float32))]), {}, layout="x")
    assert len(read_folder(tmp_path / "empty")) == 1
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        write_folder(tmp_path / "file", [], {}, layout="x")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tensor_is_read_when_it_is_asked_for(
    folder: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(MappedFile, "read", lambda file, name: read.append(name) or np.zeros(1))
    (folder / MANIFEST).unlink()
    lazy = read_folder(folder)
    assert set(lazy) == set(tensors(rng)) and "d" in lazy and lazy.without({"d"}).keys() == set(lazy) - {"d"}
    assert (lazy.shape("a.weight"), lazy.dtype("b.weight")) == ((5, 3), "bfloat16")
    assert read == []
    assert lazy["a.weight"].shape == (1,) and read == ["a.weight"]
