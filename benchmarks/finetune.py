"""SST-2 from end to end: what two commands of docs/finetuning.md come to, beside what costs nothing.

    make pretrained && python -m benchmarks.finetune            # 20 to 40 minutes on two idle cores
    python -m benchmarks.finetune --only words,zero-shot        # without training
    python -m benchmarks.finetune --only small-training,small   # 3M parameters that begin with nothing
    python -m benchmarks.finetune --only probe                  # logistic regression on the frozen model, 700 labels
    python -m benchmarks.finetune --only qlora-training,qlora   # the same adapters on a base in four bits

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import jaxlm
from benchmarks import peers
from benchmarks.asked import listed, minutes
from benchmarks.kept import Kept
from benchmarks.small_runs import own_words
from benchmarks.sst2 import LABELS, bag_of_words, chat_prompts, linear_probe, predictions, sentences, wilson
from jaxlm.config import toml

CONFIGS = {name: Path(f"configs/finetune/{name}.toml") for name in ("sst2", "sst2-small", "sst2-qlora")}
JUDGED = {"training": "tuned", "small-training": "small", "qlora-training": "qlora"}
"""The figure of the run of each training."""
FIGURES = ("words", "zero-shot", "template", "probe", *(name for pair in JUDGED.items() for name in pair))


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
    of = toml.load(config, overrides).train.steps
    return {"steps": steps, "of": of, "seconds": seconds, "cpu_seconds": cpu_seconds}


def phrase_words(data: Path, run: Path) -> tuple[str, str]:
    """Options of a run from nothing: a vocabulary of 4,096 of the training phrases and their labels."""
    texts, labels = sentences(data / "train.tsv")
    asked = (f"Review: {text}\nSentiment:{LABELS[label]}" for text, label in zip(texts, labels, strict=True))
    return own_words(asked, 4096, run.with_name(f"{run.name}-words"))


class Measure:
    """Measures figures by name that are not kept yet, until the time is over.

    Args:
        file: where they are kept.
        judged: the figure of the run of each training, which no longer holds when that training goes on.
    """

    def __init__(self, file: Path, minutes: float, judged: Mapping[str, str]) -> None:
        self.kept, self.judged, self.old = Kept(file), judged, list[str]()
        self._began, self._minutes = time.perf_counter(), minutes

    def left(self) -> float:
        """Minutes that are left."""
        return self._minutes - (time.perf_counter() - self._began) / 60

    def figure(self, name: str, options: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Print a figure, measured now if it is not there or if its training is not at its end."""
        figure = self.kept.get(name, options)
        if figure is None or (name in self.judged and figure["steps"] < figure["of"]):
            if self.left() <= 0:
                minutes = f"{self._minutes:g} minutes are over; the same command goes on"
                print(f"{name}: not begun, {minutes}", flush=True)
                return
            start = time.perf_counter()
            figure = make() | {"load": psutil.getloadavg()[0]}
            figure.setdefault("seconds", time.perf_counter() - start)
            if name in self.judged:
                self.old.append(self.judged[name])  # of fewer steps
                self.kept.remove(self.old[-1])
            self.kept.put(name, options, figure)
        print(f"{name:10} {json.dumps(figure)}", flush=True)


def main() -> None:
    """Measure what is missing, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/sst2"))
    parser.add_argument("--base", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--only", type=listed(FIGURES), default=[*FIGURES], help="which figures")
    parser.add_argument("--minutes", type=minutes, default=45.0)
    parser.add_argument("--sentences", type=int, default=0, help="ask only the first so many, to try; 0: all")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/finetune.json")
    options = parser.parse_args()
    test, labels = sentences(options.data / "test.tsv")
    if options.sentences:
        test, labels = test[: options.sentences], labels[: options.sentences]

    def plain() -> dict[str, Any]:
        base = jaxlm.load(options.base)
        return share(predictions(base, [base.encode(f"Review: {text}\nSentiment:") for text in test]), labels)

    def templated(run: Path) -> dict[str, Any]:
        prompt = chat_prompts(run)
        return share(predictions(jaxlm.load(run), [prompt(text) for text in test]), labels)

    measure = Measure(options.run.with_name(f"{options.run.name}-figures.json"), options.minutes, JUDGED)
    small, qlora = (options.run.with_name(f"{options.run.name}-{name}") for name in ("small", "qlora"))
    base = f'train.init_from="{options.base}"'

    def options_of(name: str) -> dict[str, Any]:
        config = CONFIGS[f"sst2-{name.partition('-')[0]}" if name.startswith(("small", "qlora")) else "sst2"]
        shown: dict[str, Any] = {"base": str(options.base), "data": str(options.data)}
        shown |= {"sentences": options.sentences} if options.sentences else {}
        return {**shown, "config": hashlib.sha256(config.read_bytes()).hexdigest()}

    figures: dict[str, Callable[[], dict[str, Any]]] = {
        "words": lambda: share(bag_of_words(options.data, test), labels),
        "zero-shot": plain,
        "template": lambda: templated(options.base),
        "probe": lambda: share(linear_probe(jaxlm.load(options.base), options.data, test), labels),
        "training": lambda: trained(CONFIGS["sst2"], options.run, measure.left(), base),
        "tuned": lambda: templated(options.run),
        "small-training": lambda: trained(
            CONFIGS["sst2-small"], small, measure.left(), *phrase_words(options.data, small)
        ),
        "small": lambda: templated(small),
        "qlora-training": lambda: trained(CONFIGS["sst2-qlora"], qlora, measure.left(), base),
        "qlora": lambda: templated(qlora),
    }
    for name in (name for name in FIGURES if name in options.only):
        measure.figure(name, options_of(name), figures[name])
    peers.save_figures("finetune", measure.kept.figures, options.out, without=measure.old)


if __name__ == "__main__":
    main()
