"""The plots of a comparison and `report.html`, one self-contained page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.report.page import inline, newest_sample, render
from jaxlm.run.metrics import read_metrics

if TYPE_CHECKING:
    from jaxlm.eval.compare import Columns, Comparison, Measured

BARS: dict[str, tuple[str, Callable[[Measured], float]]] = {
    "tokens_per_second": ("training, tokens/s", lambda row: row.tokens_per_second),
    "memory": ("peak memory of training, MiB", lambda row: row.peak_memory / 2**20),
    "decode": ("decoding one row, tokens/s", lambda row: row.decode_tokens_per_second),
}


def write_page(comparison: Comparison, columns: Columns) -> Path:
    """Draw the plots and write the page."""
    plots = comparison.out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    draw(comparison, plots)
    path = comparison.out / "report.html"
    path.write_text(page(comparison, columns, plots), encoding="utf-8")
    return path


def draw(comparison: Comparison, plots: Path) -> None:
    """Loss by tokens, and a bar for each model of what else was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=144)
    axes = figure.subplots()
    for i, row in enumerate(comparison.rows):
        metrics = read_metrics(comparison.out / row.name / "metrics.jsonl")
        training = [(one["tokens"], one["loss"]) for one in metrics if one.get("loss") is not None]
        per_step = training[-1][0] / max(one["step"] for one in metrics if "tokens" in one)
        held_out = [(one["step"] * per_step, one["validation_loss"]) for one in metrics if "validation_loss" in one]
        axes.plot(*zip(*training, strict=True), lw=1, alpha=0.6, color=f"C{i}")
        axes.plot(*zip(*held_out, strict=True), lw=2, marker="o", ms=4, color=f"C{i}", label=row.name)
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="thin: training, dots: validation", title_fontsize="small")
    figure.tight_layout()
    figure.savefig(plots / "loss.png")

    names = [row.name for row in comparison.rows]
    for name, (label, value) in BARS.items():
        figure = Figure(figsize=(4.6, 2.8), dpi=144)
        axes = figure.subplots()
        bars = axes.bar(names, [value(row) for row in comparison.rows], color=[f"C{i}" for i in range(len(names))])
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        axes.set(ylabel=label)
        axes.margins(y=0.12)
        figure.tight_layout()
        figure.savefig(plots / f"{name}.png")


def page(comparison: Comparison, columns: Columns, plots: Path) -> str:
    """The whole page as text."""
    samples = [(row.name, newest_sample(comparison.out / row.name)) for row in comparison.rows]
    return render(
        "comparison.html",
        title="Comparison",
        rows=comparison.rows,
        spread=f"{comparison.spread:.1%}",
        warning=comparison.warning,
        labels=[label for _, label, _ in columns],
        cells=[[text(row) for _, _, text in columns] for row in comparison.rows],
        loss=inline(plots / "loss.png"),
        bars=[(label, inline(plots / f"{name}.png")) for name, (label, _) in BARS.items()],
        samples=[(name, text) for name, text in samples if text],
    )
