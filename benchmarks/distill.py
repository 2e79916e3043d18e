"""A student with a teacher beside the text, and without: held-out loss after the same steps on the same rows.

    python -m benchmarks.distill                        goes on where it stopped; about 20 minutes of one core
    python -m benchmarks.distill --divergence hidden --folder runs/distill-hidden      by hidden states: HIDDEN

The teacher is `configs/quickstart.toml` at 2M parameters, the student `configs/finetune/distill.toml` at 0.3M.
Both students of a seed begin with the same parameters and read the same rows. They are judged by their whole
distribution on files that neither they nor the teacher were trained on. The interval is over files and seeds; beside it
stands the difference over its standard error, from the seeds alone.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.fim import left_to_right
from benchmarks.small_runs import Sequences, by_arm, compared, kept, parser, printed, scored, shape_of_runs, trained
from jaxlm.config import toml
from jaxlm.data.pipeline import prepare
from jaxlm.data.sources import Documents

TEACHER, STUDENT = Path("configs/quickstart.toml"), Path("configs/finetune/distill.toml")
ARMS = ("with", "without")
HIDDEN = [[0, 1], [-1, -1]]
"""Layers of the student's two and the teacher's four whose outputs are compared."""
WIDE = {"d_model": 192, "n_heads": 3}
"""The teacher's widths: twice the parameters of the quickstart as it is."""
PIECES = 4
"""Of each held-out file so many rows are judged."""


def settings(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """The config of one model: the `teacher`, or a student `with` or `without` it."""
    tree = tomllib.loads((TEACHER if arm == "teacher" else STUDENT).read_text(encoding="utf-8"))
    tree["data"] |= {"validation_fraction": 0.1, "cache_dir": str(options.folder / "cache")}
    tree |= {"seed": seed, "checkpoint": {"every": 200}}
    if arm == "teacher":
        train = {"steps": options.teacher_steps, "learning_rate": 4e-3}
        return tree | {"model": tree["model"] | WIDE, "train": tree["train"] | train, "eval": {"every": 200}}
    teacher = options.folder / "teacher"
    tree["model"] |= {"d_model": options.width}
    tree["train"] |= {"steps": options.steps}
    tree["distill"] |= {"teacher": str(teacher), "hard_weight": options.hard_weight, "divergence": options.divergence}
    if options.divergence == "hidden":
        tree["distill"] |= {"layers": HIDDEN}
    if arm == "without":
        del tree["distill"]
        tree |= {"recipe": "pretrain", "tokenizer": {"kind": "file", "path": str(teacher / "tokenizer.json")}}
    return tree


def scores(tree: Mapping[str, Any], run: Path, of: Sequences) -> dict[str, np.ndarray]:
    """The held-out loss of each token of a model that is trained now, and the processor seconds of its training."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    model = trained(tree, run)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"nll": scored(model, of).nll, "cpu_seconds": np.array(seconds)}


def main() -> None:
    """Train what is missing, and print the comparison."""
    made = parser("distill", __doc__, teacher_steps=600, steps=400, width=80)
    made.add_argument("--hard-weight", type=float, default=0.5)
    made.add_argument("--divergence", choices=("forward", "reverse", "jsd", "hidden"), default="forward")
    options = made.parse_args()
    own, teacher = shape_of_runs(options), settings(options, "teacher", 0)
    cfg = toml.from_dict(teacher)
    texts = [document.text for side, document in Documents(cfg.data) if side == "validation"]
    of, files = left_to_right(prepare(cfg).tokenizer, texts, cfg.data.seq_len, PIECES)
    taught = kept(options.folder / "teacher", own, functools.partial(scores, teacher, options.folder / "teacher", of))
    print(f"teacher: {taught['nll'].mean():.4f} nats a token, {taught['cpu_seconds']:.0f} processor s", flush=True)
    made_by = lambda arm, seed, run: scores(settings(options, arm, seed), run, of)  # noqa: E731
    found = by_arm(options, ARMS, made_by, "nll")
    ours, theirs = ([one["nll"] for one in found[arm]] for arm in ARMS)
    figure = compared(ours, theirs, np.asarray(files))
    printed("student, with its teacher against without", figure)
    if options.seeds > 1:
        error = statistics.stdev(figure["by seed"]) / len(figure["by seed"]) ** 0.5
        figure |= {"standard error over seeds": error, "in standard errors": figure["difference"] / error}
        print(f"{'':44} {figure['in standard errors']:+.1f} standard errors of {options.seeds} seeds")
    figure["teacher"] = float(taught["nll"].mean())
    seconds = {arm: [float(one["cpu_seconds"]) for one in found[arm]] for arm in ARMS}
    figure["cpu_seconds"] = {"teacher": float(taught["cpu_seconds"]), **seconds}
    figure["options"] = own | {"seeds": options.seeds}
    name = "distill" if options.divergence == "forward" else f"distill-{options.divergence}"
    peers.save_figures("distill", {name: figure}, options.out)


if __name__ == "__main__":
    main()
