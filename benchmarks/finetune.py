"""SST-2 from end to end: what two commands of docs/finetuning.md come to, beside what costs nothing.

    make pretrained && python -m benchmarks.finetune            # 20 to 40 minutes on two idle cores
    python -m benchmarks.finetune --only words,zero-shot        # without training
    python -m benchmarks.finetune --only small-training,small   # 3M parameters that begin with nothing

It trains `configs/finetune/sst2.toml` (or goes on with runs/sst2) and asks all 1,821 test sentences. Every figure is
kept as soon as it is known, with its interval (Wilson 1927, 95 %), in a file beside the run, and a figure that is there
is not measured again: an interrupted command goes on where it was. After `--minutes` no further figure is begun, and
the training is stopped as by Ctrl-C, which saves it. `results/` is written at the end; figures of other commands stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import jaxlm
from benchmarks import peers
from benchmarks.asked import listed, minutes
from benchmarks.kept import Kept
from benchmarks.small_runs import own_words
from benchmarks.sst2 import LABELS, bag_of_words, chat_prompts, predictions, sentences, wilson
from jaxlm.config import toml

CONFIG, SMALL = Path("configs/finetune/sst2.toml"), Path("configs/finetune/sst2-small.toml")
FIGURES = ("words", "zero-shot", "template", "training", "tuned", "small-training", "small")


def share(found: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How many are right, of how many, and the interval."""
    right = int((found == labels).sum())
    interval = list(wilson(right, len(labels)))
    return {"right": right, "of": len(labels), "accuracy": right / len(labels), "interval": interval}


def trained(config: Path, run: Path, minutes: float, *overrides: str) -> dict[str, Any]:
    """Train the config, or go on with its run; after so many minutes it is stopped and saves."""
    resume = ["--resume"] if (run / "config.toml").is_file() else []
    command = [sys.executable, "-m", "jaxlm", "train", str(config), f'out_dir="{run}"', *overrides, *resume]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, process = time.perf_counter(), subprocess.Popen(command)
    try:
        process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = max(row["step"] for row in rows)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"steps": steps, "of": toml.load(config).train.steps, "seconds": seconds, "cpu_seconds": cpu_seconds}


def phrase_words(data: Path, run: Path) -> tuple[str, str]:
    """Options of a run from nothing: a vocabulary of 4,096 of the training phrases and their labels."""
    texts, labels = sentences(data / "train.tsv")
    asked = (f"Review: {text}\nSentiment:{LABELS[label]}" for text, label in zip(texts, labels, strict=True))
    return own_words(asked, 4096, run.with_name(f"{run.name}-words"))


def main() -> None:
    """Measure what is missing, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/sst2"))
    parser.add_argument("--base", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--only", type=listed(FIGURES), default=[*FIGURES], help="which figures")
    parser.add_argument("--minutes", type=minutes, default=45.0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/finetune.json")
    options = parser.parse_args()
    test, labels = sentences(options.data / "test.tsv")

    def plain() -> dict[str, Any]:
        base = jaxlm.load(options.base)
        return share(predictions(base, [base.encode(f"Review: {text}\nSentiment:") for text in test]), labels)

    def templated(run: Path) -> dict[str, Any]:
        prompt = chat_prompts(run)
        return share(predictions(jaxlm.load(run), [prompt(text) for text in test]), labels)

    began, kept = time.perf_counter(), Kept(options.run.with_name(f"{options.run.name}-figures.json"))
    small = options.run.with_name(f"{options.run.name}-small")

    def options_of(name: str) -> dict[str, str]:
        config = SMALL if name.startswith("small") else CONFIG
        shown = {"base": str(options.base), "data": str(options.data)}
        return {**shown, "config": hashlib.sha256(config.read_bytes()).hexdigest()}

    left = lambda: options.minutes - (time.perf_counter() - began) / 60  # noqa: E731
    figures: dict[str, Callable[[], dict[str, Any]]] = {
        "words": lambda: share(bag_of_words(options.data, test), labels),
        "zero-shot": plain,
        "template": lambda: templated(options.base),
        "training": lambda: trained(CONFIG, options.run, left()),
        "tuned": lambda: templated(options.run),
        "small-training": lambda: trained(SMALL, small, left(), *phrase_words(options.data, small)),
        "small": lambda: templated(small),
    }
    old: list[str] = []
    for name in (name for name in FIGURES if name in options.only):
        figure, own = kept.get(name, options_of(name)), options_of(name)
        if figure is None or (name.endswith("training") and figure["steps"] < figure["of"]):
            if left() <= 0:
                print(f"{name}: not begun, {options.minutes:g} minutes are over; the same command goes on", flush=True)
                continue
            start = time.perf_counter()
            figure = figures[name]() | {"load": psutil.getloadavg()[0]}
            figure.setdefault("seconds", time.perf_counter() - start)
            if name.endswith("training"):
                old.append({"training": "tuned", "small-training": "small"}[name])  # of fewer steps
                kept.remove(old[-1])
            kept.put(name, own, figure)
        print(f"{name:10} {json.dumps(figure)}", flush=True)
    peers.save_figures("finetune", kept.figures, options.out, without=old)


if __name__ == "__main__":
    main()
