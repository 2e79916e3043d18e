"""Verdicts while the machine is busy, what is left after many hostile programs, and what isolation costs."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxlm.sandbox import Limits, Sandbox, Tests, grade, grade_many, run
from jaxlm.sandbox.battery.escapes import processes_with
from jaxlm.sandbox.verdicts import Verdict

ADD = Tests("def check(f):\n    assert f(1, 2) == 3\n    assert f(5, b=6) == 11\n\ncheck(candidate)\n", names=("add",))
LIMITS = Limits(cpu_seconds=1.0, idle_seconds=1.0, memory=128 << 20)
FIVE_KINDS = {
    "passed": "def add(a, b):\n    sum(range(3_000_000))\n    return a + b",
    "failed": "def add(a, b): return a - b",
    "exception": "def add(a, b): return [][a]",
    "cpu_time": "def add(a, b):\n    while True: pass",
    "not_plain": "def add(a, b): return object()",
}
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


def spin(end: float) -> None:
    while time.monotonic() < end:
        sum(range(10_000))


@contextmanager
def busy(processes: int, seconds: float) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    end = time.monotonic() + seconds
    started = [context.Process(target=spin, args=(end,)) for _ in range(processes)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
            process.join()


def verdicts(sandbox: Sandbox, times: int) -> list[dict]:
    work = [(program, ADD, LIMITS) for program in FIVE_KINDS.values()] * times
    return [Verdict.record(verdict) for verdict in grade_many(work, sandbox)]


@pytest.mark.parametrize("times", [1, pytest.param(164, marks=pytest.mark.soak)])
def test_a_busy_machine_gives_the_same_verdicts(times: int, sandbox: Sandbox) -> None:
    idle = verdicts(sandbox, times)
    with busy(8, 3600):
        assert verdicts(sandbox, times) == idle
    assert [record["kind"] for record in idle] == list(FIVE_KINDS) * times


def state() -> tuple[int, bytes, int]:
    return (
        len(os.listdir("/proc/self/fd")),
        Path("/proc/self/mountinfo").read_bytes(),
        len(list(Path("/tmp").glob("jaxlm-box-*"))),
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
