"""Plots of a run as PNG files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.run.metrics import OF_THE_MACHINE, SECONDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]


def plot_loss(
    rows: Sequence[Row],
    path: Path,
    baseline: float | None = None,
    baseline_name: str = "unigram baseline",
    *,
    unit: str = "nats a token",
) -> None:
    """Draw training and validation loss against the step into a PNG, with the baseline if there is one.

    Without a unit the two are different measures, as in reinforcement learning: each has a panel and a scale.
    """
    from matplotlib.figure import Figure

    apart = not unit and all(_points(rows, key) for key in LOSSES)
    figure = Figure(figsize=(7, 5 if apart else 4), dpi=144)
    panels: list[Axes] = list(figure.subplots(1 + apart, squeeze=False, sharex=True).flat)
    judged = panels[-1]
    for axes, (key, style) in zip((panels[0], judged), LOSSES.items(), strict=True):
        if points := _points(rows, key):
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    for key in sorted({key for row in rows for key in row if key.startswith("validation_loss_")}):
        style = {"lw": 1, "ls": ":", "marker": ".", "ms": 4}
        judged.plot(*zip(*_points(rows, key), strict=True), label=key.replace("_", " "), **style)
    if baseline is not None and math.isfinite(baseline):
        judged.axhline(baseline, color="grey", ls="--", lw=1, label=baseline_name)
    judged.set(xlabel="step")
    judged.locator_params(axis="x", integer=True)  # no half steps
    for axes, key in zip(panels, LOSSES, strict=False):
        axes.set(ylabel=key.replace("_", " ") if apart else f"loss, {unit}".removesuffix(", "))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # a run that ends before its first report has nothing to show
            axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


LOSSES: dict[str, dict[str, Any]] = {
    "loss": {"lw": 1, "alpha": 0.7, "color": "C0"},
    "validation_loss": {"lw": 2, "marker": "o", "ms": 4, "color": "C1"},
}


def _points(rows: Sequence[Row], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


ELSEWHERE = re.compile(r"step|tokens|weight|skipped|loss|(.+_)?learning_rate|validation_loss(_.+)?|share_.+")
"""Names of metrics that other plots show, or that need none."""
PANELS = 36


def measures_of(rows: Sequence[Row]) -> list[str]:
    """The names of the measures that have a panel, at most `PANELS`."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            counts[name] = counts.get(name, 0) + isinstance(value, float)
    names = [name for name, count in counts.items() if count > 1]
    return [name for name in names if not ELSEWHERE.fullmatch(name) and not OF_THE_MACHINE.fullmatch(name)][:PANELS]


def plot_measures(rows: Sequence[Row], path: Path) -> None:
    """Draw each measure of the recipe against the step, a panel each, into a PNG; nothing if there is none.

    Rewards, margins, KL, entropy, lengths and gradients' norms are such measures: all numbers of `metrics.jsonl` that
    are reported more than once and do not depend on the machine.
    """
    names = measures_of(rows)
    if not names:
        return
    from matplotlib.figure import Figure

    height = -(-len(names) // 3)
    figure = Figure(figsize=(9, 2 * height), dpi=120)
    panels = list(figure.subplots(height, 3, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), float)]
        axes.plot(*zip(*points, strict=True), lw=1, marker="." if len(points) < 20 else "")
        axes.set_title(name.replace("_", " "), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.locator_params(axis="x", integer=True)
        axes.yaxis.get_offset_text().set_fontsize(6)  # a power of ten, beside the title
        axes.grid(alpha=0.3)
    for axes in panels[len(names) :]:
        axes.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_time(rows: Sequence[Row], path: Path) -> None:
    """Draw where the time between reports went, in shares, against the step into a PNG, with the goodput of the run."""
    rows = [row for row in rows if "goodput" in row]
    if not rows:
        return
    from matplotlib.figure import Figure

    kinds = [*dict.fromkeys(name for row in rows for name in row if name.startswith(SECONDS))]  # older rows have fewer
    totals = [max(sum(row.get(kind, 0) for kind in kinds), 1e-9) for row in rows]
    shares = [[row.get(kind, 0) / total for row, total in zip(rows, totals, strict=True)] for kind in kinds]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 3), dpi=144)
    axes = figure.subplots()
    labels = [kind.removeprefix(SECONDS).replace("_", " ") for kind in kinds]
    # A legend leaves out what begins with an underscore: kinds that took no time.
    labels = [name if max(share) > 0.001 else f"_{name}" for name, share in zip(labels, shares, strict=True)]
    axes.stackplot(steps, shares, labels=labels, step="pre", alpha=0.8)
    axes.plot(steps, [row["goodput"] for row in rows], color="black", lw=1, label="goodput")
    axes.set(xlabel="step", ylabel="share of time", ylim=(0, 1))
    axes.locator_params(axis="x", integer=True)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
