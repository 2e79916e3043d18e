"""The preflight in real processes of `jax.distributed`, healthy and with planted faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from jaxlm.launch.local import without_noise
from tests.child_flags import with_devices

ROOT = Path(__file__).parents[2]
FAULTY = Path(__file__).with_name("preflight_with_faults.py")
TOML = """
[model]
d_model = 16
n_layers = 2
n_heads = 2
[data]
cache_dir = "{folder}/cache"
"""


def preflight(folder: Path, faults: str, *options: str, processes: int = 2, devices: int = 2) -> tuple[list[int], str]:
    """Run it as `processes` processes: their exit codes, and what process 0 printed."""
    (folder / "a.toml").write_text(TOML.format(folder=folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {
        "JAXLM_COORDINATOR": f"127.0.0.1:{port}",
        "JAXLM_PROCESSES": str(processes),
        "XLA_FLAGS": with_devices(devices),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "OTHER_FOLDER": str(folder / "own"),
        "DIES": "1" if "dies" in faults else "",
    }
    command = [sys.executable, str(FAULTY), faults, str(folder / "a.toml"), f"out_dir={folder}/run", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen(command, env={**os.environ, **own, "JAXLM_PROCESS_ID": str(index)}, **pipes)
        for index in range(processes)
    ]
    printed = [process.communicate(timeout=120) for process in running]
    assert [[*without_noise(out.splitlines())] for out, _ in printed[1:]] == [[]] * (processes - 1), (
        "process 0 alone tells"
    )
    return [process.returncode for process in running], printed[0][0] + printed[0][1]


def verdicts(printed: str) -> dict[str, str]:
    """The checks that did not pass, by name."""
    lines = [line.split(maxsplit=2) for line in printed.splitlines() if line.startswith(("ok", "FAIL", "warn"))]
    return {name: text for verdict, name, text in lines if verdict == "FAIL"}


def test_three_healthy_processes(tmp_path: Path) -> None:
    codes, printed = preflight(tmp_path, "", "--devices=6", processes=3)
    assert (codes, verdicts(printed)) == ([0, 0, 0], {}), printed
    report = json.loads((tmp_path / "run" / "preflight.json").read_text())
    names = [check["name"] for check in report["checks"]]
    assert names == ["versions", "storage", "storage", "clocks", "devices", "all-reduce", "pairs"]
    assert report["passed"] and [row["bytes"] for row in report["all_reduce"]] == [1e6, 4e6]
    assert [row["processes"] for row in report["pairs"]] == [[0, 1], [1, 2]]
    assert report["devices"] == [{"count": 2, "kind": "cpu"}] * 3
    left = [path.name for folder in ("run", "cache") for path in (tmp_path / folder).iterdir()]
    assert left == ["preflight.json"]


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    codes, printed = preflight(tmp_path, "version,device,clock,folder")
    found = verdicts(printed)
    assert codes == [1, 1], printed
    assert found["versions"].startswith("jax ") and found["versions"].endswith("but process 1 has 0.0.1")
    assert found["devices"] == "3 in all; local 2, but process 1 has 1"
    assert "process 1 by +30.0 s" in found["clocks"]
    assert "not shared: process 1 and process 0 do not see" in found["storage"]
    assert "all-reduce" not in found
    assert not json.loads((tmp_path / "run" / "preflight.json").read_text())["passed"]


def test_a_mesh_that_does_not_fit_is_the_users_mistake(tmp_path: Path) -> None:
    """Exit code 2, so that no launcher starts it again, with the line of the mistake last."""
    codes, printed = preflight(tmp_path, "", "mesh.data=3")
    assert (codes, verdicts(printed)) == ([2, 2], {})
    assert "[mesh] data 3" in printed and "does not fit 4 devices" in printed.splitlines()[-1]


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    """Exit code 1 of the others: another machine in its place may do better."""
    codes, printed = preflight(tmp_path, "dies")
    assert codes == [1, 9], printed
    assert verdicts(printed) == {"answers": "process 1 did not tell its versions in 3 s; see its log"}
