"""Verdicts while the machine is busy, what is left after many hostile programs, and what isolation costs."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import verdicts as rounds
from benchmarks.kept import Kept
from benchmarks.verdicts import ADD, EACH, FIVE_KINDS, LIMITS, busy, measure, verdicts
from jaxlm.sandbox import Sandbox, grade, run
from jaxlm.sandbox.battery.escapes import processes_with

HOSTILE = [
    ("import os\nwhile True: os.fork()", "python"),
    ("x = [0]\nwhile True: x += x", "python"),
    ("for n in range(2000): open(str(n), 'w').write('x')", "python"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "python"),
    ("import threading, time\n[threading.Thread(target=time.sleep, args=(9,)).start() for n in range(20)]", "python"),
    ("for n in 1 2 3 4 5; do (setsid sleep 99 &) ; done; mkdir -p a/b/c; chmod 0 a", "bash"),
    ("trap '' TERM HUP INT; for n in $(seq 60); do sleep 99 & done", "bash"),
    ("yes", "bash"),
]


@pytest.mark.parametrize("times", [1, pytest.param(EACH, marks=pytest.mark.soak)])
def test_a_busy_machine_gives_the_same_verdicts(times: int, sandbox: Sandbox) -> None:
    idle = verdicts(sandbox, times)
    with busy(8, 3600):
        assert verdicts(sandbox, times) == idle
    assert [record["kind"] for record in idle] == list(FIVE_KINDS) * times


def test_rounds_that_are_done_are_not_judged_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []

    def judge(_: Sandbox, each: int) -> list[dict[str, str]]:
        judged.append(each)
        return [{"kind": kind} for kind in FIVE_KINDS] * each

    monkeypatch.setattr(rounds, "verdicts", judge)
    monkeypatch.setattr(rounds, "BUSY", 0)
    for times in (1, 1, 2):
        assert measure(times, 1, Kept(tmp_path / "figures.json"), tmp_path / "verdicts.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if ": {" in line] == ["alone 1", "busy 1", "alone 2", "busy 2"]
    assert len(judged) == 4
    assert lines[-1].startswith("4 of 4 rounds have the same verdicts, each as expected, in ")


def state() -> tuple[int, bytes, int]:
    return (
        len(os.listdir("/proc/self/fd")),
        Path("/proc/self/mountinfo").read_bytes(),
        len(list(Path(tempfile.gettempdir()).glob(f"jaxlm-box-{os.getpid()}-*"))),
    )


@pytest.mark.parametrize("times", [1, pytest.param(125, marks=pytest.mark.soak)])
def test_nothing_is_left_after_hostile_programs(times: int, each_sandbox: Sandbox) -> None:
    run("print(1)", b"", "python", LIMITS, each_sandbox)
    before, memory = state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(times):
        for program, language in HOSTILE:
            run(program, b"", language, LIMITS, each_sandbox)
    assert state()[:2] == before[:2] and state()[2] <= before[2]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20 << 10
    assert not processes_with("sleep\x0099\x00")


@pytest.mark.soak
def test_what_isolation_costs(sandbox: Sandbox) -> None:
    """Bounds are for an idle machine; the ratios are printed."""
    bare = [sandbox.interpreter.executable, "-S", "-B", "-c", "pass"]
    took: dict[str, list[float]] = {"bare": [], "run": [], "grade": []}
    for _ in range(30):
        for name in took:
            began = time.perf_counter()
            if name == "bare":
                subprocess.run(bare, check=True)
            elif name == "run":
                run("pass", b"", "python", LIMITS, sandbox)
            else:
                grade(FIVE_KINDS["failed"], ADD, LIMITS, sandbox)
            took[name].append(time.perf_counter() - began)
    bare_time, run_time, grade_time = (statistics.median(times) for times in took.values())
    print(f"bare {bare_time * 1e3:.1f} ms, run {run_time / bare_time:.2f} x, grade {grade_time / bare_time:.2f} x")
    assert run_time < 4 * bare_time and grade_time < 6 * bare_time
