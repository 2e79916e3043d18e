"""A run that goes on with another mesh, or with other processes, has the loss curve of the run that stayed; float64."""

import os
import shutil
import signal

import numpy as np
import pytest

from jaxlm.train.engine import JaxEngine

FLOAT64 = ("numerics.params=float64", "numerics.compute=float64", "numerics.matmul=highest", "log.every=1")
MODEL = ("model.n_heads=4", "model.n_kv_heads=4", 'model.pattern=["attention+moe"]', "model.d_ff=16")
OPTIONS = (*FLOAT64, *MODEL, "train.microbatches=1", "train.batch_size=8", "eval.every=0", "train.steps=8")
BOUND = 1e-10


def assert_same_curve(run, whole, rows, leaves) -> None:
    found, expected = rows(run), rows(whole)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name, value in other.items():
            np.testing.assert_allclose(row[name], value, rtol=BOUND, atol=1e-13, err_msg=f"{name} of {row['step']}")
    parameters, others = leaves(run), leaves(whole)
    assert parameters.keys() == others.keys()
    for name, value in others.items():
        np.testing.assert_allclose(parameters[name], value, rtol=BOUND, atol=1e-11, err_msg=name)


def mesh(**sizes: int) -> tuple[str, ...]:
    return tuple(f"mesh.{axis}={sizes.get(axis, 1)}" for axis in ("data", "fsdp", "expert", "context", "tensor"))


def test_from_mesh_to_mesh(runs, tmp_path, rows, leaves, monkeypatch):
    read, steps = [], []
    original = JaxEngine.step

    def step(engine, batch):
        read.extend(map(bytes, batch["tokens"]))
        if len(read) == 8 * steps[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(engine, batch)

    monkeypatch.setattr(JaxEngine, "step", step)
    steps.append(0)
    runs.train(tmp_path / "whole", *OPTIONS, *mesh(data=2, expert=2, context=2))
    expected = list(read)
    read.clear()
    meshes = {2: mesh(fsdp=8), 5: mesh(data=2, tensor=4)}
    for steps[0], sizes in meshes.items():
        with pytest.raises(SystemExit):
            runs.train(tmp_path / "run", *OPTIONS, *sizes, resume=True)
    runs.train(tmp_path / "run", *OPTIONS, *mesh(fsdp=8), resume=True)
    assert read == expected and len(read) == 8 * 8
    assert_same_curve(tmp_path / "run", tmp_path / "whole", rows, leaves)


@pytest.fixture(scope="module")
def two_processes(runs, tmp_path_factory):
    """The run of two processes that nobody disturbs, with every checkpoint."""
    out = tmp_path_factory.mktemp("two")
    launched(runs, out, "checkpoint.every=4", "checkpoint.keep=9")
    return out


def launched(runs, out, *options, resume=False) -> None:
    process = runs.launch(out, *OPTIONS, *options, processes=2, devices=2, resume=resume)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said


def test_from_two_processes_to_one_and_back(runs, two_processes, tmp_path, rows, leaves):
    shutil.copytree(two_processes, tmp_path / "one", ignore=shutil.ignore_patterns("8"))
    runs.train(tmp_path / "one", *OPTIONS, *mesh(data=2, tensor=4), resume=True)
    assert_same_curve(tmp_path / "one", two_processes, rows, leaves)
    shutil.copytree(tmp_path / "one", tmp_path / "back", ignore=shutil.ignore_patterns("8"))
    launched(runs, tmp_path / "back", *mesh(fsdp=4), resume=True)
    assert_same_curve(tmp_path / "back", two_processes, rows, leaves)
