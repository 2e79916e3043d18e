"""The most that a machine computes, where no vendor says it: the best product of several shapes and libraries, kept.

One shape of one library is no peak: a step can be faster than it. So the best is searched for once for each machine,
and what two frameworks found is put together.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 512, 2048), (4096, 256, 1024))
"""Rows, inner and columns of the products; all of them together take half a second of two cores."""
TRIES = 3
Multiply = Callable[[np.ndarray, np.ndarray], Callable[[], object]]
"""From two matrices to the call that multiplies them and waits for the product."""


def peak_flops(folder: str | Path, device: str, library: str, multiply: Multiply, reached: float) -> float:
    """FLOP/s in float32 of the best product on a device, found once and kept in `folder`.

    Args:
        device: the name of an accelerator; empty for the CPU, on which numpy's products are tried too.
        library: the name and version of what multiplies.
        reached: FLOP/s of a run. Where they are more than what is kept, that was measured on a busy machine: it is
            measured again, and the peak is no less than what was reached.
    """
    file, machine = Path(folder) / "peak_flops.json", device or _processor()
    kept = _read(file)
    found = kept.setdefault(machine, {})
    if library not in found or max(found.values()) < reached:
        ways = [multiply] if device else [multiply, lambda a, b: lambda: a @ b]
        found[library] = max(reached, *(_best(way, shape) for way in ways for shape in SHAPES))
        _write(file, kept)
    return max(found.values())


def _best(multiply: Multiply, shape: tuple[int, int, int]) -> float:
    m, k, n = shape
    product = multiply(np.ones((m, k), np.float32), np.ones((k, n), np.float32))
    product()  # compiles, and fills the caches
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * m * k * n / min(seconds)


def _processor() -> str:
    """The model of the processor and the cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def _read(file: Path) -> dict[str, dict[str, float]]:
    """What is kept; a file that cannot be read is written anew."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write(file: Path, kept: dict[str, dict[str, float]]) -> None:
    """At once, so that no process reads half of it; a folder that may not be written keeps nothing."""
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
