"""Parts of a run's page that only some stages have: scores of held-out pairs, and samples of a policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.report.page import inline
from jaxlm.run.pair_scores import PairScores
from jaxlm.run.rollouts import best_and_worst, kept_steps, read_rollouts

PHASES = 3
"""Phases of which the page shows samples: the first that was kept, the last, and one between."""
EACH = 3
"""Of the best, and of the worst samples of a phase."""
LONGEST = 400
"""Characters of a prompt or a sample; `jaxlm rollouts` shows them whole."""


class Pairs(NamedTuple):
    """What a reward model makes of held-out pairs."""

    count: int
    figures: list[tuple[str, str, str]]
    """Name, value, and what it means."""
    image: str


class Samples(NamedTuple):
    """Some samples of a phase."""

    step: int
    count: int
    reward: float
    rows: Sequence[Mapping[str, Any]]


MEANINGS = {
    "accuracy": "the chosen answer scores higher",
    "longer": "the longer answer is the chosen one: a model that is no better has learnt length",
    "accuracy_where_shorter": "accuracy where the chosen answer is the shorter one",
    "auc": "any chosen answer scores higher than any rejected one",
    "ece": "expected calibration error: how far from the probability that it gives the model is right",
    "length_correlation": "of score and length of an answer",
    "swap_drift": "largest change of a score when the answers of a pair change places",
}


def pairs_of(run_dir: Path) -> Pairs | None:
    """The figures and the plot of a reward model's run; None: it is none, or nothing was held out."""
    scores = PairScores.read(run_dir)
    if scores is None:
        return None
    draw_pairs(scores, run_dir / "plots" / "pairs.png")
    found = scores.figures()
    shown = [(name.replace("_", " "), _number(name, found[name]), text) for name, text in MEANINGS.items()]
    return Pairs(len(scores.chosen), shown, inline(run_dir / "plots" / "pairs.png"))


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.1%}" if name.startswith(("accuracy", "longer")) else f"{value:.3g}"


def samples_of(run_dir: Path) -> list[Samples]:
    """The best and the worst samples of a few phases that a run of reinforcement learning has kept."""
    steps = kept_steps(run_dir)
    places = sorted({round(i * (len(steps) - 1) / (PHASES - 1)) for i in range(PHASES)}) if steps else []
    found = []
    for place in places:
        kept = read_rollouts(run_dir, steps[place])
        rewards = [row["reward"] for row in kept.rows if row["reward"] is not None]
        best, worst = best_and_worst(kept.rows, EACH)
        rows = [{**row, "prompt": _cut(row["prompt"]), "text": _cut(row["text"])} for row in [*best, *worst[::-1]]]
        found.append(Samples(kept.step, len(kept.rows), sum(rewards) / max(len(rewards), 1), rows))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def draw_pairs(scores: PairScores, path: Path) -> None:
    """Draw calibration, the scores against the lengths, and the differences of the scores, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), dpi=120)
    sure, length, difference = figure.subplots(1, 3)
    calibration = scores.calibration()
    some = calibration.counts > 0
    centres = (calibration.edges[:-1] + calibration.edges[1:]) / 2
    sure.bar(centres[some], calibration.right[some], width=0.046, color="C0", alpha=0.8, label="right")
    sure.plot([0.5, 1], [0.5, 1], color="black", lw=1, ls="--", label="well calibrated")
    for centre, right, count in zip(centres[some], calibration.right[some], calibration.counts[some], strict=True):
        sure.annotate(f"{count}", (centre, right), ha="center", va="bottom", fontsize=6)
    sure.set(xlabel="probability that the model gives", ylabel="how often it is right", xlim=(0.5, 1), ylim=(0, 1.08))
    sure.set_title(f"calibration, error {calibration.error:.3f}", fontsize=9)
    sides = ((scores.chosen_length, scores.chosen, "chosen"), (scores.rejected_length, scores.rejected, "rejected"))
    for number, (tokens, values, label) in enumerate(sides):
        length.scatter(tokens, values, s=8, alpha=0.6, color=f"C{number}", label=label, lw=0)
    length.set(xlabel="tokens of the answer", ylabel="score")
    length.set_title(f"score and length, correlation {scores.figures()['length_correlation']:.2f}", fontsize=9)
    moved = (scores.chosen - scores.rejected)[~scores.tie]
    difference.hist(moved, bins=30, color="C0", alpha=0.8)
    difference.axvline(0, color="black", lw=1, ls="--")
    right = (moved > 0).mean() if moved.size else 0.0
    difference.set(xlabel="score of the chosen - score of the rejected", ylabel="pairs")
    difference.set_title(f"{right:.1%} in the right order", fontsize=9)
    for axes in (sure, length):
        axes.legend(frameon=False, fontsize=7)
    for axes in (sure, length, difference):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
