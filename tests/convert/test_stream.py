"""Tensors on their way: chunks, hashes, order, memory, and what a killed conversion leaves behind."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import native
from jaxlm.convert.canonical import leaves
from jaxlm.convert.files import storage, stream
from jaxlm.convert.files.storage import MANIFEST, Planned, read_folder, write_folder
from jaxlm.convert.rows import plan
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError

MB = 1_000_000


@settings(deadline=None)
@given(
    array=hnp.arrays(np.int16, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)),
    turn=st.randoms(use_true_random=False),
    size=st.integers(1, 60),
)
def test_chunks_follow_each_other(array: np.ndarray, turn: Any, size: int) -> None:
    view = array.transpose(turn.sample(range(array.ndim), array.ndim))
    parts = list(stream.chunks(view, size))
    assert b"".join(part.tobytes() for part in parts) == view.tobytes()
    assert all(part.nbytes <= max(size, 2) for part in parts)
    assert stream.sha256(view) == hashlib.sha256(view.tobytes()).hexdigest()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("place", [0, 700_000, -1])
def test_what_is_not_finite_is_seen(dtype: str, value: str, place: int) -> None:
    info = ml_dtypes.finfo(dtype)
    array = np.resize(np.array([info.max, info.min, 0.0, -0.0, info.tiny], dtype), 900_001)
    assert stream.all_finite(array) and stream.all_finite(array[:0])
    array[place] = np.float64(value)
    assert not stream.all_finite(array) and not stream.all_finite(array.reshape(1, -1).T)


def test_whole_numbers_are_finite() -> None:
    assert stream.all_finite(np.full(3, -1, np.int16))


def test_values_that_were_not_checked_are_refused(torch_folder: Path, tmp_path: Path) -> None:
    (torch_folder / MANIFEST).unlink()
    data = bytearray((torch_folder / storage.SINGLE).read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (torch_folder / storage.SINGLE).write_bytes(data)
    last = list(read_folder(torch_folder))[-1]
    for to in ("jaxlm", "torch", "llama"):
        with pytest.raises(UserError) as caught:
            convert(torch_folder, tmp_path / "out", to)
        assert caught.value.message == f"{torch_folder}: {last} is NaN or infinite somewhere"
    assert list(tmp_path.iterdir()) == [torch_folder]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_a_damaged_source_is_noticed_while_it_is_converted(
    tmp_path: Path, make_model: Callable, make_params: Callable, layout: str
) -> None:
    """Whether a tensor is written as it is stored, and hashed once for both, or is made anew."""
    settings = config.Config(model=make_model(rope_layout=layout))
    params = native.to_torch(make_params(settings.model), settings.model)
    files = {"config.toml": toml.to_toml(settings)}
    write_folder(tmp_path / "torch", storage.planned(params), files, layout="torch")
    path, name = tmp_path / "torch" / storage.SINGLE, "layers.1.mixer.k_proj.weight"
    data, row = bytearray(path.read_bytes()), read_folder(tmp_path / "torch")[name][0].tobytes()
    data[data.index(row)] ^= 1
    path.write_bytes(data)
    for to in ("llama", "jaxlm"):
        with pytest.raises(UserError) as caught:
            convert(tmp_path / "torch", tmp_path / "out", to)
        assert caught.value.message == f"{path}: tensor {name} differs from {MANIFEST}"
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


def test_what_is_written_as_it_is_stored_is_hashed_once(
    torch_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[np.ndarray] = []
    monkeypatch.setattr(storage, "sha256", lambda array: hashed.append(array) or stream.sha256(array))
    convert(torch_folder, tmp_path / "out", "llama")
    assert len(hashed) <= 1  # beartype looks at the first value of a mapping
    dict(read_folder(tmp_path / "out"))
    assert hashed


def test_tensors_of_one_source_are_made_together(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> np.ndarray:
        made.append(name[-1])
        return np.zeros(3)

    names = [f"{i}.{source}" for i in range(8) for source in "ab"]
    tensors = [Planned(name, (3,), "float64", lambda name=name: make(name), source=name[-1]) for name in names]
    write_folder(tmp_path / "w", tensors, {}, layout="x")
    assert "".join(made) == "a" * 8 + "b" * 8
    assert list(read_folder(tmp_path / "w")) == names


def test_large_tensors_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SLACK", 0)
    held, most = [0], [0]

    def make() -> np.ndarray:
        held[0] += 1
        most[0] = max(most[0], held[0])
        time.sleep(0.01)
        held[0] -= 1
        return np.zeros(1000)

    tensors = [Planned(str(i), (1000,), "float64", make) for i in range(20)]
    write_folder(tmp_path / "w", tensors, {}, layout="x")
    assert most == [1]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("bad"), ValueError("bad"), MemoryError()])
def test_a_tensor_that_cannot_be_made_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def make() -> np.ndarray:
        raise error

    good = [Planned(str(i), (9,), "float64", lambda: np.zeros(9)) for i in range(9)]
    with pytest.raises(type(error)):
        write_folder(tmp_path / "w", [*good, Planned("bad", (9,), "float64", make)], {}, layout="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("made", [np.zeros(8), np.zeros(9, np.float32)])
def test_a_tensor_that_is_not_as_planned_is_noticed(tmp_path: Path, made: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"planned float64 \(9,\)"):
        write_folder(tmp_path / "w", [Planned("a", (9,), "float64", lambda: made)], {}, layout="x")


def test_a_full_disk_shows_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 70})())
    made: list[int] = []
    tensors = [Planned("a", (9,), "float64", lambda: made.append(1) or np.zeros(9))]
    with pytest.raises(UserError, match="the disk is full, nothing was kept"):
        write_folder(tmp_path / "w", tensors, {}, layout="x")
    assert not made and list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
import numpy as np
from jaxlm.convert.files.storage import Planned, write_folder

def make():
    print("writing", flush=True)
    time.sleep(60)

tensors = [Planned("a", (9,), "float64", lambda: np.zeros(9)), Planned("b", (9,), "float64", make)]
write_folder(sys.argv[1], tensors, {"config.toml": ""}, layout="x", overwrite=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_writing_leaves_nothing_that_looks_whole(tmp_path: Path, number: int) -> None:
    old = [Planned("a", (2,), "float32", lambda: np.ones(2, np.float32))]
    write_folder(tmp_path / "w", old, {}, layout="x")
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "w"], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "writing\n"
    with pytest.raises(UserError, match="truncated or damaged"):
        read_folder(tmp_path / f".w.{child.pid}.partial")
    write_folder(tmp_path / "w", old, {}, layout="x")  # does not disturb the process that is still at work
    assert (tmp_path / f".w.{child.pid}.partial").is_dir()
    child.send_signal(number)
    child.communicate()
    assert read_folder(tmp_path / "w")["a"].tolist() == [1, 1]
    assert (tmp_path / f".w.{child.pid}.partial").is_dir()
    (tmp_path / f".other.{child.pid}.partial").mkdir()
    write_folder(tmp_path / "w", old, {}, layout="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.{child.pid}.partial", "w"]


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for _ in range(2):  # killed between the two renamings, then after them
        (tmp_path / f".w.{ended.pid}.old").mkdir()
        (tmp_path / f".w.{ended.pid}.old" / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="exists and is not an earlier result"):
            write_folder(tmp_path / "w", [], {}, layout="x")
        assert [path.name for path in tmp_path.iterdir()] == ["w"]
        assert (tmp_path / "w" / "notes.txt").read_text() == "mine"


CONVERTED = """
import sys
from jaxlm.convert.write_model import convert
convert(*sys.argv[1:])
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path, rng: np.random.Generator) -> None:
    cfg = config.Model(vocab_size=4096, d_model=1024, n_layers=20, n_heads=8, d_ff=4096, max_seq_len=64)
    noise = rng.standard_normal(1 << 20, np.float32).astype("bfloat16")
    parameters = {name: np.resize(noise, leaf.shape) for name, leaf in leaves(cfg).items()}
    tensors = list(plan(parameters, cfg, native.rows(cfg)))
    files = {"config.toml": toml.to_toml(config.Config(model=cfg))}
    written = write_folder(tmp_path / "torch", tensors, files, layout="torch")
    allowed = 2 * max(tensor.nbytes for tensor in tensors) + 300 * MB
    assert written.bytes > allowed
    command = [sys.executable, "-c", CONVERTED, tmp_path / "torch", tmp_path / "llama", "llama"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < allowed
