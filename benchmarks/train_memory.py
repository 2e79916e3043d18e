"""Memory of the real `jaxlm train` of the 15.7M dense model over its steps, against the engine that it drives.

python -m benchmarks.train_memory --steps 500
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import peers, startup
from benchmarks.asked import positive
from benchmarks.peers import Child, Peer


def of_command(steps: int) -> list[int]:
    """Resident bytes at each step of `jaxlm train`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").touch()
        options = (f"train.steps={steps}", f"out_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}")
        command = [sys.executable, "-m", "jaxlm", "train", folder / "config.toml", *startup.OVERRIDES, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["memory_bytes"] for line in map(json.loads, lines) if "memory_bytes" in line]


def of_engine() -> int:
    """Peak bytes of a process that holds the engine alone and steps on one batch."""
    with tempfile.TemporaryDirectory() as folder:
        child = Child("benchmarks.train_step", Peer("jaxlm"), [], peers.best_environment(Path(folder)))
        peak = max(child.round()["peak_bytes"] for _ in range(5))
        child.close()
    return peak


def run(steps: int, out: Path | None = None) -> dict[str, Any]:
    """Measure both, print them, write the JSON."""
    engine, seen = of_engine(), of_command(steps)
    results = {
        "steps": steps,
        "engine_peak_bytes": engine,
        "command_bytes": {
            "first": seen[0],
            "median": int(statistics.median(seen)),
            "most": max(seen),
            "last": seen[-1],
        },
        "most_over_engine": max(seen) / engine,
    }
    print(json.dumps(results, indent=2))
    peers.save("train_memory", results, out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_memory", description=__doc__)
    parser.add_argument("--steps", type=positive, default=500)
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/train_memory.json")
    arguments = parser.parse_args()
    run(arguments.steps, arguments.out)


if __name__ == "__main__":
    main()
