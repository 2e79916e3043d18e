"""What isolation costs: a trivial program in each sandbox against bare Python, and graded programs a second.

python -m benchmarks.sandbox
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.asked import positive
from jaxlm.sandbox import Limits, Sandbox, Tests, choose, grade, grade_many, run
from jaxlm.sandbox.choose import BACKENDS

ADD = Tests("assert candidate(1, 2) == 3\nassert candidate(5, b=6) == 11\n", names=("add",))
PROGRAM = "def add(a, b):\n    return a + b\n"
LIMITS = Limits()
BARE = "bare python -S -B"


def sandboxes() -> list[Sandbox]:
    """The isolations that work here."""
    return [choose(name) for name, backend in BACKENDS.items() if name != "none" and not backend.problem()]


def actions(listed: list[Sandbox]) -> dict[str, Callable[[], Any]]:
    """One call each: a bare interpreter, a program in one box, a program with its tests in two."""
    bare = [listed[0].interpreter.executable, "-S", "-B", "-c", "pass"]
    made: dict[str, Callable[[], Any]] = {BARE: lambda: subprocess.run(bare, check=True)}
    for one in listed:
        made[f"{one.name}: run"] = lambda one=one: run("pass", b"", "python", LIMITS, one)
        made[f"{one.name}: grade"] = lambda one=one: grade(PROGRAM, ADD, LIMITS, one)
    return made


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round after round, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def throughput(one: Sandbox, programs: int) -> float:
    """Graded programs a second, on all cores."""
    work = [(f"{PROGRAM}# {number}\n", ADD, LIMITS) for number in range(programs)]
    began = time.perf_counter()
    passed = sum(verdict.passed for verdict in grade_many(work, one))
    if passed != programs:
        raise RuntimeError(f"{programs - passed} of {programs} right programs failed in {one.name}")
    return programs / (time.perf_counter() - began)


def measure(rounds: int, programs: int, out: Path | None = None) -> dict[str, Any]:
    """Measure, print a table, write the JSON."""
    listed = sandboxes()
    seconds = interleaved(actions(listed), rounds)
    base = statistics.median(seconds[BARE])
    results: dict[str, Any] = {"rounds": rounds, "programs": programs, "calls": {}, "graded_per_s": {}}
    for name, times in seconds.items():
        middle = statistics.median(times)
        results["calls"][name] = {"median_s": middle, "min_s": min(times), "ratio": middle / base}
        print(f"{name:22} median {middle * 1e3:7.1f} ms  least {min(times) * 1e3:7.1f} ms  {middle / base:5.2f} x bare")
    for one in listed:
        results["graded_per_s"][one.name] = throughput(one, programs)
        print(f"{one.name:22} {results['graded_per_s'][one.name]:7.1f} graded programs/s")
    peers.save("sandbox", results, out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=40, help="calls of each kind")
    parser.add_argument("--programs", type=positive, default=200, help="programs for the throughput of each sandbox")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/sandbox.json")
    arguments = parser.parse_args()
    measure(arguments.rounds, arguments.programs, arguments.out)


if __name__ == "__main__":
    main()
