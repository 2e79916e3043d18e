"""Verdicts on 820 programs of five kinds, alone and beside busy processes: they must be the same each time.

    python -m benchmarks.verdicts --times 10

Each round is kept as it ends, in the folder of --runs: the same command, typed again, does only those that lack.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks import peers
from benchmarks.asked import positive
from benchmarks.kept import Kept
from jaxlm.sandbox import Limits, Sandbox, Tests, choose, grade_many

ADD = Tests("def check(f):\n    assert f(1, 2) == 3\n    assert f(5, b=6) == 11\n\ncheck(candidate)\n", names=("add",))
LIMITS = Limits(cpu_seconds=1.0, idle_seconds=1.0, memory=128 << 20)
FIVE_KINDS = {
    "passed": "def add(a, b):\n    sum(range(3_000_000))\n    return a + b",
    "failed": "def add(a, b): return a - b",
    "exception": "def add(a, b): return [][a]",
    "cpu_time": "def add(a, b):\n    while True: pass",
    "not_plain": "def add(a, b): return object()",
}
EACH = 164
"""Programs of a kind."""
BUSY = 8
"""Processes that compute all the time."""


def spin(end: float) -> None:
    """Compute until a time of the monotonic clock."""
    while time.monotonic() < end:
        sum(range(10_000))


@contextmanager
def busy(processes: int, seconds: float) -> Iterator[None]:
    """Keep processes computing; they end with the context, and by themselves after `seconds`."""
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


def verdicts(sandbox: Sandbox, each: int) -> list[dict]:
    """Judge programs of the five kinds in turn. Returns the records of their verdicts."""
    work = [(program, ADD, LIMITS) for program in FIVE_KINDS.values()] * each
    return [verdict.record() for verdict in grade_many(work, sandbox)]


def measure(times: int, each: int, kept: Kept, out: Path | None = None) -> int:
    """Judge `times` alone and `times` beside busy processes. Returns how many rounds differ from what is expected."""
    sandbox = choose()
    options = {"each": each, "busy": BUSY, "sandbox": sandbox.name}
    for name in [f"{way} {number}" for number in range(1, times + 1) for way in ("alone", "busy")]:
        if kept.get(name, options) is not None:
            continue
        began = time.monotonic()
        with busy(BUSY, 3 * 3600) if name.startswith("busy") else nullcontext():
            records = verdicts(sandbox, each)
        expected = [record["kind"] for record in records] == list(FIVE_KINDS) * each
        digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]
        figure = {"programs": len(records), "as_expected": expected, "digest": digest}
        kept.put(name, options, {**figure, "seconds": time.monotonic() - began, "load": os.getloadavg()[0]})
        print(f"{name}: {kept.figures[name]}", flush=True)
    peers.save_figures("verdicts", kept.figures, out)
    digests = [figure["digest"] for figure in kept.figures.values() if figure["as_expected"]]
    same = max(map(digests.count, digests), default=0)
    print(f"{same} of {len(kept.figures)} rounds have the same verdicts, each as expected, in {sandbox.name}")
    return len(kept.figures) - same


def main() -> None:
    """Judge the rounds that lack, and end with exit code 1 if one differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description=__doc__)
    parser.add_argument("--times", type=positive, default=10, help="rounds alone, and as many beside busy processes")
    parser.add_argument("--each", type=positive, default=EACH, help="programs of each kind in a round")
    parser.add_argument("--runs", type=Path, default=Path("runs/verdicts"), help="folder of the rounds that are done")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/verdicts.json")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    kept = Kept(arguments.runs / "figures.json")
    raise SystemExit(bool(measure(arguments.times, arguments.each, kept, arguments.out)))


if __name__ == "__main__":
    main()
