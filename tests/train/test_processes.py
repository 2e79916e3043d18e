"""Several processes train what one does: the same batches, losses and parameters, and one set of files."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.convert.open_model import load
from jaxlm.processes.hang_watch import HUNG
from tests.devices import on_devices
from tests.waiting import HANGS

STEPS = 3
FLOAT64 = ("numerics.params=float64", "numerics.compute=float64")
OPTIONS = (f"train.steps={STEPS}", "eval.every=2", "log.every=1", "checkpoint.every=0", "train.batch_size=8", *FLOAT64)
SAMPLE = ('sample.prompts=["def "]', "sample.max_new_tokens=4", "sample.temperature=0")
SOAK = pytest.mark.soak


def command(runs, out: Path, processes: int, devices: int, *overrides: str, grace: int = 10) -> list[str]:
    """The command line of a run as so many processes."""
    python, module, jaxlm, *train = runs.command(out, *overrides)
    options = {"processes": processes, "devices-per-process": devices, "grace": grace}
    launch = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [python, module, jaxlm, "launch", "local", *launch, "--", *train]


def on_mesh(**axes: int) -> tuple[str, ...]:
    return "model.n_heads=4", "model.n_kv_heads=4", *(f"mesh.{axis}={size}" for axis, size in axes.items())


@pytest.mark.parametrize(
    ("processes", "devices", "mesh", "extra"),
    [
        (2, 1, {"data": 1, "tensor": 2}, ()),  # both read the same rows; rows of their own: test_topology.py
        pytest.param(4, 1, {"data": 1, "fsdp": 2, "tensor": 2}, (), marks=SOAK),
        pytest.param(2, 2, {"data": 1, "fsdp": 2, "tensor": 2}, SAMPLE, marks=SOAK),
        pytest.param(2, 2, {"data": 4}, SAMPLE, marks=SOAK),
        pytest.param(2, 2, {"data": 1, "tensor": 4}, SAMPLE, marks=SOAK),
        pytest.param(4, 1, {"data": 1, "context": 4}, SAMPLE, marks=SOAK),
        pytest.param(4, 2, {"data": 2, "context": 2, "tensor": 2}, SAMPLE, marks=SOAK),
        pytest.param(2, 4, {"data": 1, "tensor": 2, "context": 2, "fsdp": 2}, SAMPLE, marks=SOAK),
    ],
)
def test_processes_train_what_one_does(runs, tmp_path, rows, processes, devices, mesh, extra):
    options = (*OPTIONS, *extra, *on_mesh(**mesh))
    with on_devices(processes * devices):
        runs.train(tmp_path / "one", *options)
    words = command(runs, tmp_path / "many", processes, devices, *options)
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr

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
    assert {line[:4] for line in done.stdout.splitlines()} == {"[0] "}, "the others are silent"
    logs = {path.name for path in (tmp_path / "many" / "logs").iterdir()}
    assert logs == {f"process-{i}.log" for i in range(processes)}
    begun, _, later = (tmp_path / "many" / "logs" / "process-0.log").read_text().partition("kernels: ")
    assert "[Gloo]" in begun and later and "[Gloo]" not in later, "all groups of devices are connected at the start"


def pair(runs, out: Path, *differing: str) -> list[tuple[int, str]]:
    """Two processes, each with an option of its own; their exit codes and what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"distributed.coordinator=127.0.0.1:{probe.getsockname()[1]}"
    mine = [("distributed.processes=2", coordinator, f"distributed.process_id={i}", differing[i]) for i in range(2)]
    pipes = {"stderr": subprocess.STDOUT}
    processes = [runs.start(out, *OPTIONS, *options, **pipes) for options in mine]
    printed = [process.communicate(timeout=HANGS)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


@SOAK
def test_processes_that_differ_are_refused_on_both(runs, tmp_path):
    for code, printed in pair(runs, tmp_path / "run", "train.learning_rate=0.1", "train.learning_rate=0.2"):
        assert code == 2, printed
        expected = "error: the processes differ in train.learning_rate: 0.1 on process 0; 0.2 on process 1 ("
        assert printed.splitlines()[-1].startswith(expected)
    assert not (tmp_path / "run" / "config.toml").exists()


@SOAK
def test_caches_need_not_be_shared(runs, tmp_path):
    folders = [f'data.cache_dir="{tmp_path / str(i)}"' for i in range(2)]
    assert [code for code, _ in pair(runs, tmp_path / "run", *folders)] == [0, 0]
    assert len(list(tmp_path.glob("?/*/meta.json"))) == 2, "each has prepared the corpus"


@SOAK
def test_a_stopped_process_is_noticed_and_named(runs, tmp_path):
    """SIGSTOP: the others end after `heartbeat_timeout`, and JAX says which one was silent."""
    options = ("train.steps=1000000", "log.every=1", "distributed.heartbeat_timeout=10")
    words = command(runs, tmp_path, 2, 1, *options, grace=1)
    launcher = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert launcher.stdout and any("step 1/" in line for line in launcher.stdout), "it trains"
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    silent = next(int(pid) for pid in children if b"JAXLM_PROCESS_ID=1" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(silent, signal.SIGSTOP)
    printed = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 128 + signal.SIGABRT
    assert re.search(r"unhealthy \(stopped sending heartbeats\):\n\[0\] 1\n", printed), printed
    assert "launch: process 0 was killed by SIGABRT" in printed
    assert not Path(f"/proc/{silent}").exists()


HANG = """
import os
if os.environ.get("JAXLM_PROCESS_ID") == "1":
    import time, jaxlm.data.packing.stream as packing
    read = packing.PackedRows.__getitem__
    packing.PackedRows.__getitem__ = lambda rows, index: time.sleep(1000) if index.min() > 100 else read(rows, index)
"""


LATE = """
import os
if os.environ.get("JAXLM_PROCESS_ID") == "1":
    import time, jax
    def late(event, _, fun_name="", **__):
        if event.endswith("backend_compile_duration") and fun_name in ("jit(add_up)", "jit(traced)"):
            time.sleep(35)
    jax.monitoring.register_event_duration_secs_listener(late)
"""


@SOAK
def test_processes_wait_for_one_that_compiles_for_longer_than_gloo_waits(runs, tmp_path, monkeypatch):
    """The exchange of all devices, the step and the validation are each compiled 35 s later by one process."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    words = command(runs, tmp_path / "run", 2, 1, *OPTIONS, "mesh.data=2")
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@SOAK
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("processes", [2, 4])
def test_twenty_rounds_beside_two_busy_processes(runs, tmp_path, monkeypatch, processes):
    """Every second round compiles everything; 1 and 2 devices each, on meshes that split the sequence too."""
    meshes = ({"data": 1, "fsdp": processes}, {"data": processes, "context": 2})
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for number in range(20):
            if number % 2:
                monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / f"cache {number}"))
            options = (*OPTIONS, *SAMPLE, *on_mesh(**meshes[number % 2]))
            words = command(runs, tmp_path / f"run {number}", processes, 1 + number % 2, *options)
            done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS)
            printed = done.stdout + done.stderr
            assert done.returncode == 0 and "Traceback" not in printed, f"round {number}: {printed}"
            monkeypatch.undo()
    finally:
        for process in busy:
            process.kill()
            process.wait()


@SOAK
def test_a_process_that_hangs_is_named(runs, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(HANG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    words = command(runs, tmp_path / "run", 2, 1, "train.steps=100", "eval.every=0", "distributed.hang_seconds=30")
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == HUNG
    assert re.search(r"error: process \d: nothing finished for 30 s, .*; process 1 is behind, ", done.stdout)
    assert "sitecustomize.py" in (tmp_path / "run" / "logs" / "process-1.log").read_text(), "where it hangs"
