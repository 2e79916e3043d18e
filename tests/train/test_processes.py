"""Several processes train what one does: the same batches, losses and parameters, and one set of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

STEPS = 3
FLOAT64 = ("numerics.params=float64", "numerics.compute=float64")
OPTIONS = (f"train.steps={STEPS}", "eval.every=2", "log.every=1", "checkpoint.every=0", "train.batch_size=8", *FLOAT64)
SAMPLE = ('sample.prompts=["def "]', "sample.max_new_tokens=4", "sample.temperature=0")
SOAK = pytest.mark.soak


def launch(runs, out: Path, processes: int, devices: int, *overrides: str) -> str:
    """Run as so many processes; returns what was printed."""
    _, _, _, *train = runs.command(out, *overrides)
    options = ["--processes", str(processes), "--devices-per-process", str(devices), "--"]
    command = [sys.executable, "-m", "jaxlm", "launch", "local", *options, *train]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_mesh(**axes: int) -> tuple[str, ...]:
    return "model.n_heads=4", "model.n_kv_heads=4", *(f"mesh.{axis}={size}" for axis, size in axes.items())


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (4, 1, {"data": 1, "fsdp": 2, "tensor": 2}),
        pytest.param(2, 2, {"data": 1, "fsdp": 2, "tensor": 2}, marks=SOAK),
        pytest.param(2, 2, {"data": 4}, marks=SOAK),
        pytest.param(2, 2, {"data": 1, "tensor": 4}, marks=SOAK),
        pytest.param(4, 1, {"data": 1, "context": 4}, marks=SOAK),
        pytest.param(4, 2, {"data": 2, "context": 2, "tensor": 2}, marks=SOAK),
        pytest.param(2, 4, {"data": 1, "tensor": 2, "context": 2, "fsdp": 2}, marks=SOAK),
    ],
)
def test_processes_train_what_one_does(runs, tmp_path, leaves, rows, monkeypatch, processes, devices, mesh):
    options = (*OPTIONS, *SAMPLE, *on_mesh(**mesh))
    few = jax.devices()[: processes * devices]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: few)
        runs.train(tmp_path / "one", *options)
    shown = launch(runs, tmp_path / "many", processes, devices, *options)

    expected, found = leaves(tmp_path / "one"), leaves(tmp_path / "many")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-10, atol=1e-13, err_msg=name)
    assert len(rows(tmp_path / "many")) == len(rows(tmp_path / "one")) == STEPS + 2
    for one, many in zip(rows(tmp_path / "one"), rows(tmp_path / "many"), strict=True):
        assert many.keys() == one.keys()
        np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-10)
    sample = f"samples/{STEPS:08}.txt"
    assert (tmp_path / "many" / sample).read_bytes() == (tmp_path / "one" / sample).read_bytes()
    assert {line[:4] for line in shown.splitlines()} == {"[0] "}, "the others are silent"
    logs = {path.name for path in (tmp_path / "many" / "logs").iterdir()}
    assert logs == {f"process-{i}.log" for i in range(processes)}
