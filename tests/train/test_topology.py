"""A run that goes on with another mesh, or with other processes, has the loss curve of the run that stayed; float64."""

import os
import shutil
import signal

import numpy as np
import pytest

from jaxlm.train.engine import JaxEngine

pytestmark = pytest.mark.usefixtures("traced_once")
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
    runs.train(tmp_path / "whole", *spread, *mesh(fsdp=8))
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


@pytest.mark.soak
def test_from_one_process_to_four_and_back(runs, spread, tmp_path, rows, leaves):
    whole, four, back = (tmp_path / name for name in ("whole", "four", "back"))
    runs.train(whole, *spread, *mesh(data=2, tensor=4), "checkpoint.every=4", "checkpoint.keep=9")
    shutil.copytree(whole, four, ignore=shutil.ignore_patterns("8"))
    runs.launched(four, *spread, *mesh(fsdp=4), processes=4, devices=1, resume=True)
    assert_same_curve(four, whole, rows, leaves)
    shutil.copytree(four, back, ignore=shutil.ignore_patterns("8"))
    runs.train(back, *spread, *mesh(data=2, tensor=4), resume=True)
    assert_same_curve(back, whole, rows, leaves)


@pytest.mark.soak
def test_float32_errs_as_it_does_undisturbed(runs, spread, tmp_path, rows, leaves):
    """Against float64, a run that changes its mesh in the middle is at most twice as far off as one that stays."""
    start, exact, whole, changed = (tmp_path / name for name in ("start", "exact", "whole", "changed"))
    spread = (*spread, "model.dropout=0.0")  # which draws other numbers in float64
    narrow = (*spread, "numerics.params=float32", "numerics.compute=float32")
    options = (*mesh(fsdp=8), "checkpoint.every=4", "checkpoint.keep=9", f'train.init_from="{start}"')
    runs.train(start, *narrow, "train.steps=1")
    runs.train(exact, *spread, *options)
    runs.train(whole, *narrow, *options)
    shutil.copytree(whole, changed, ignore=shutil.ignore_patterns("8"))
    runs.train(changed, *narrow, *mesh(data=2, tensor=4), resume=True)
    true, stayed, moved = ({**leaves(run), **losses(rows(run))} for run in (exact, whole, changed))
    assert true.keys() == stayed.keys() == moved.keys()
    errors = {name: (relative(moved[name], true[name]), relative(stayed[name], true[name])) for name in true}
    assert any(moved != stayed for moved, stayed in errors.values())  # it is another mesh
    assert max(stayed for _, stayed in errors.values()) < 1e-3  # of the same model
    for name, (moved, stayed) in errors.items():
        assert moved <= max(2 * stayed, 8 * np.finfo(np.float32).eps), (name, moved, stayed)


def losses(rows) -> dict[str, float]:
    return {f"loss of step {row['step']}": row["loss"] for row in rows if "loss" in row}


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
