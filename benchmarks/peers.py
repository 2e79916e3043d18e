"""Time several programs fairly: each in a process of its own, one round of one, then one round of the next, and again.

A benchmark module has a table of `Peer`s and a function that makes one of them ready. `compare` starts the module once
for each peer (`--child NAME`), waits until all are warm, alternates their rounds, and returns medians and spread. The
other processes sleep while one works.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.asked import positive
from benchmarks.kept import merged, now, this_command

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy", "litgpt", "xllamacpp")

# MKL asks this function whether it runs on an Intel processor, and takes its AVX-512 path only then.
INTEL_SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"


@dataclasses.dataclass(frozen=True)
class Peer:
    """One program to time. `best` gives it the malloc thresholds of jaxlm and the widest vector units there are."""

    name: str
    best: bool = False


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_environment(folder: Path) -> dict[str, str]:
    """The settings of the honest opponent: the malloc thresholds that jaxlm gives itself (`freed_memory`), threads that
    do not spin while the other works, and on AMD a shim that shows MKL an Intel processor, by both of its symbols.
    """
    if sys.platform != "linux":
        return {}
    tunables = {"mmap_threshold": 2**31 - 1, "trim_threshold": 2**31 - 1, "top_pad": 64 * 2**20, "arena_max": 1}
    named = ":".join(f"glibc.malloc.{name}={value}" for name, value in tunables.items())
    environment = {"GLIBC_TUNABLES": named, "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "passive"}
    if "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        source, library = folder / "shim.c", folder / "shim.so"
        source.write_text(INTEL_SHIM, encoding="utf-8")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
        environment["LD_PRELOAD"] = str(library)
    return environment


class Child:
    """A peer's process. It reads one line for each round and answers with one line of JSON."""

    def __init__(self, module: str, peer: Peer, arguments: Sequence[str], best: Mapping[str, str]) -> None:
        stock = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
        self.started = time.time()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--child", peer.name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**stock, **(best if peer.best else {}), "CHILD_STARTED": repr(self.started)},
        )
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print("go", file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def serve(make: Callable[[], Callable[[], Any]], *, peak_flops: Callable[[], float], warm_up: int = 2) -> None:
    """The child's side: make the work ready, warm it up, then do it once for each line and tell how long it took.

    Work that returns rows of ids is asked once for its answer, of which the first row goes along.
    """
    work = make()
    answer = work()
    first = time.time() - float(os.environ["CHILD_STARTED"])
    for _ in range(warm_up):
        work()
    ids = {"ids": answer[0]} if isinstance(answer, list) and isinstance(answer[0], list) else {}
    print(json.dumps({"first_s": first, "peak_flops": peak_flops(), **ids}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"s": seconds, "cpu_s": cpu_seconds, "peak_bytes": peak_memory()}), flush=True)


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(module: str, peers: Sequence[Peer], rounds: int, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run `rounds` alternating rounds of all peers; for each its seconds (median, least, most), memory and start."""
    with tempfile.TemporaryDirectory() as folder:
        best = best_environment(Path(folder))
        children: dict[str, Child] = {}
        try:
            for peer in peers:
                print(f"  starting {peer.name}", file=sys.stderr, flush=True)
                children[peer.name] = Child(module, peer, arguments, best)
            answers: dict[str, list[dict[str, Any]]] = {name: [] for name in children}
            for _ in range(rounds):
                for name, child in children.items():
                    answers[name].append(child.round())
        finally:
            for child in children.values():
                child.close()
    return {name: summary(children[name].ready, answers[name]) for name in children}


def summary(ready: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and spread of the rounds of one peer."""
    seconds = [answer["s"] for answer in answers]
    return {
        **ready,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "cpu_s": statistics.median(answer["cpu_s"] for answer in answers),
        "peak_bytes": answers[-1]["peak_bytes"],
    }


def main_of_steps(
    name: str, description: str | None, child: Callable[[str], None], run: Callable[[int, Path | None], Any]
) -> None:
    """The command of a benchmark of training steps: `run(rounds, out)`, or one of its peers by `child(name)`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--rounds", type=positive, default=12, help="steps of each peer")
    parser.add_argument("--out", type=Path, help=f"JSON file to write; default: benchmarks/results/{name}.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
    else:
        run(arguments.rounds, arguments.out)


def print_steps(title: str, found: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, float]) -> None:
    """The table of a benchmark of training steps: a line a peer, then the ratios."""
    print(f"{title:34} {'tokens/s':>9} {'median':>8} {'least':>8} {'most':>8} {'cpu':>7} {'memory':>8} {'MFU':>6}")
    for name, one in found.items():
        mfu = f"{one['mfu']:6.1%}" if "mfu" in one else ""
        print(
            f"{name:34} {one['tokens_per_s']:9,.0f} {one['median_s']:7.3f}s {one['min_s']:7.3f}s {one['max_s']:7.3f}s "
            f"{one['cpu_s']:6.2f}s {one['peak_bytes'] / 1e9:6.2f}GB {mfu}"
        )
    print("  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


def torch_peak() -> float:
    """FLOP/s of torch's float32 matrix product."""
    import torch

    x = torch.ones(2048, 2048)
    return _fastest_product(lambda: x @ x, 2048)


def jax_peak() -> float:
    """FLOP/s of XLA's float32 matrix product."""
    import jax
    import jax.numpy as jnp

    x, product = jnp.ones((2048, 2048)), jax.jit(jnp.dot)
    return _fastest_product(lambda: product(x, x).block_until_ready(), 2048)


def _fastest_product(product: Callable[[], Any], size: int, tries: int = 12) -> float:
    product()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def save_figures(name: str, figures: Mapping[str, Any], out: Path | None = None, without: Sequence[str] = ()) -> Path:
    """Write figures by name, beside those of earlier commands that stand in the file and were not measured anew.

    Args:
        without: names of earlier figures that no longer hold.
    """
    path = out or RESULTS / f"{name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before["figures"] = {key: one for key, one in before.get("figures", {}).items() if key not in without}
    return save(name, {"figures": merged(before, figures)}, path)


def save(name: str, results: Mapping[str, Any], out: Path | None = None) -> Path:
    """Write `results` with the machine, the versions and the command."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    record = {
        "benchmark": name,
        "command": this_command(),
        "time": now(),
        "machine": {
            "processor": processor(),
            "threads": threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "load_average": os.getloadavg(),
            "python": platform.python_version(),
            "versions": versions,
        },
        **results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    return path


def processor() -> str:
    """The processor's name."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
