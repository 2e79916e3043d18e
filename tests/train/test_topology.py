"""A run that goes on with another mesh, or with other processes, has the loss curve of the run that stayed; float64."""

import os
import shutil
import signal

import numpy as np
import pytest

from jaxlm.train.engine import JaxEngine

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


def test_from_mesh_to_mesh(runs, spread, tmp_path, rows, leaves, monkeypatch):
    read, steps = [], []
    original = JaxEngine.step

    def step(engine, batch):
        read.extend(map(bytes, batch["tokens"]))
        if len(read) == 8 * steps[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(engine, batch)

    monkeypatch.setattr(JaxEngine, "step", step)
    steps.append(0)
    runs.train(tmp_path / "whole", *spread, *mesh(data=2, expert=2, context=2))
    expected = list(read)
    read.clear()
    meshes = {2: mesh(fsdp=8), 5: mesh(data=2, tensor=4)}
    for steps[0], sizes in meshes.items():
        with pytest.raises(SystemExit):
            runs.train(tmp_path / "run", *spread, *sizes, resume=True)
    runs.train(tmp_path / "run", *spread, *mesh(fsdp=8), resume=True)
    assert read == expected and len(read) == 8 * 8
    assert_same_curve(tmp_path / "run", tmp_path / "whole", rows, leaves)


def test_from_two_processes_to_one_and_back(runs, spread, two_processes, tmp_path, rows, leaves):
    shutil.copytree(two_processes, tmp_path / "one", ignore=shutil.ignore_patterns("8"))
    runs.train(tmp_path / "one", *spread, *mesh(data=2, tensor=4), resume=True)
    assert_same_curve(tmp_path / "one", two_processes, rows, leaves)
    shutil.copytree(tmp_path / "one", tmp_path / "back", ignore=shutil.ignore_patterns("8"))
    runs.launched(tmp_path / "back", *spread, *mesh(fsdp=4), processes=2, devices=2, resume=True)
    assert_same_curve(tmp_path / "back", two_processes, rows, leaves)
