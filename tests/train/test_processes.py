"""Several processes train what one does: the same batches, losses and parameters, and one set of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.convert.load import load

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
    ("processes", "devices", "mesh", "extra"),
    [
        (4, 1, {"data": 1, "fsdp": 2, "tensor": 2}, ()),
        pytest.param(2, 2, {"data": 1, "fsdp": 2, "tensor": 2}, SAMPLE, marks=SOAK),
        pytest.param(2, 2, {"data": 4}, SAMPLE, marks=SOAK),
        pytest.param(2, 2, {"data": 1, "tensor": 4}, SAMPLE, marks=SOAK),
        pytest.param(4, 1, {"data": 1, "context": 4}, SAMPLE, marks=SOAK),
        pytest.param(4, 2, {"data": 2, "context": 2, "tensor": 2}, SAMPLE, marks=SOAK),
        pytest.param(2, 4, {"data": 1, "tensor": 2, "context": 2, "fsdp": 2}, SAMPLE, marks=SOAK),
    ],
)
def test_processes_train_what_one_does(runs, tmp_path, rows, monkeypatch, processes, devices, mesh, extra):
    options = (*OPTIONS, *extra, *on_mesh(**mesh))
    few = jax.devices()[: processes * devices]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: few)
        runs.train(tmp_path / "one", *options)
    shown = launch(runs, tmp_path / "many", processes, devices, *options)

    one, many = (jax.tree_util.tree_leaves_with_path(load(tmp_path / name).params) for name in ("one", "many"))
    assert [path for path, _ in one] == [path for path, _ in many]
    for (path, expected), (_, found) in zip(one, many, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-13, err_msg=str(path))
    assert len(rows(tmp_path / "many")) == len(rows(tmp_path / "one")) == STEPS + 2
    for expected, found in zip(rows(tmp_path / "one"), rows(tmp_path / "many"), strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-10)
    samples = [[path.read_text() for path in (tmp_path / name).glob("samples/*")] for name in ("one", "many")]
    assert samples[0] == samples[1] and len(samples[0]) == (extra is SAMPLE)
    assert {line[:4] for line in shown.splitlines()} == {"[0] "}, "the others are silent"
    logs = {path.name for path in (tmp_path / "many" / "logs").iterdir()}
    assert logs == {f"process-{i}.log" for i in range(processes)}
