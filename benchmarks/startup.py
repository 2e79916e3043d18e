"""From process start to the first finished step of `jaxlm train`, data pipeline included.

`nothing` has no cache at all: the tokenizer is trained and the corpus tokenised first. `cold` has the corpus but no
compiled program, `warm` has both. transformers builds the same model and does one step on random ids.

python -m benchmarks.startup
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import peers, train_step
from benchmarks.asked import positive
from benchmarks.peers import Child, Peer

OVERRIDES = (
    *("train.steps=2", "train.batch_size=8", "data.seq_len=512", "log.every=1", "eval.every=0", "eval.batches=1"),
    *("checkpoint.every=0", "data.max_bytes=4000000", "sample.prompts=[]", f"tokenizer.vocab_size={train_step.VOCAB}"),
    *(f"model.d_model={train_step.WIDTH}", f"model.n_layers={train_step.LAYERS}", f"model.n_heads={train_step.HEADS}"),
    *(f"model.n_kv_heads={train_step.KV_HEADS}", f"model.d_ff={train_step.FFN}", "model.tie_embeddings=false"),
)


def first_step(folder: Path, run: str, compiled: Path) -> float:
    """Seconds until `jaxlm train` has written the metrics of its first step."""
    config, metrics = folder / "config.toml", folder / run / "metrics.jsonl"
    config.touch()
    options = (*OVERRIDES, f"out_dir={folder / run}", f"data.cache_dir={folder / 'cache'}")
    log = (folder / f"{run}.log").open("w", encoding="utf-8")
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxlm", "train", config, *options],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compiled)},
    )
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    seconds = time.time() - start
    if process.wait():
        raise RuntimeError(Path(log.name).read_text(encoding="utf-8"))
    return seconds


def transformers_first_step(best: bool) -> float:
    """The same for an eager transformers step, without any data pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        environment = peers.best_environment(Path(folder)) if best else {}
        child = Child("benchmarks.train_step", Peer("transformers eager", best), [], environment)
        child.close()
    return child.ready["first_s"]


def run(rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Start everything `rounds` times in turn, print medians, write the JSON."""
    seconds: dict[str, list[float]] = {
        "nothing": [],
        "cold": [],
        "warm": [],
        "transformers": [],
        "transformers, best": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds["nothing"].append(first_step(folder, "nothing", folder / "programs"))
        for i in range(rounds):
            programs = folder / f"programs-{i}"
            seconds["cold"].append(first_step(folder, f"cold-{i}", programs))
            seconds["warm"].append(first_step(folder, f"warm-{i}", programs))
            seconds["transformers"].append(transformers_first_step(best=False))
            seconds["transformers, best"].append(transformers_first_step(best=True))
    for kind, times in seconds.items():
        middle = statistics.median(times)
        print(f"start, {kind:20} median {middle:6.2f}s  least {min(times):6.2f}s  most {max(times):6.2f}s")
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    peers.save("startup", {"rounds": rounds, "seconds": seconds, "median_s": medians}, out)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=5, help="starts of each kind")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/startup.json")
    arguments = parser.parse_args()
    run(arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
