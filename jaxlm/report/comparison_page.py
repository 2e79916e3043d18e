"""The plots of a comparison and `report.html`, one self-contained page."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.run.metrics import read_metrics

if TYPE_CHECKING:
    from jaxlm.eval.compare import Columns, Comparison, Measured

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:68rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .8rem;text-align:right}td:first-child,th:first-child{text-align:left}
th{font-weight:600;border-bottom:1px solid #ccc}img{max-width:100%}.half{width:49%}.dim{color:#777}.bad{color:#c0392b}
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:13px;line-height:1.35}"""

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
    head = "".join(f"<th>{label}" for _, label, _ in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(text(row))}" for _, _, text in columns) for row in comparison.rows)
    tokens = comparison.rows[0].tokens
    return "\n".join(
        [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title><style>{STYLE}</style>",
            f"<h1>{escape(', '.join(row.name for row in comparison.rows))}</h1>",
            f"<p class=dim>The same text, {tokens:,} tokens each, parameters within {comparison.spread:.1%}.</p>",
            f"<p class=bad>{comparison.warning}</p>" if comparison.warning else "",
            f"<table><tr>{head}{body}</table>",
            f'<h2>Loss</h2><img alt="loss against tokens" src="{_inline(plots / "loss.png")}">',
            "<h2>Speed and memory</h2>",
            *(
                f'<img class=half alt="{label}" src="{_inline(plots / f"{name}.png")}">'
                for name, (label, _) in BARS.items()
            ),
            "<h2>Models</h2><table><tr><th>model<th>pattern<th>FLOP a token<th>largest rise",
            "<th>cache a token<th>and fixed",
            *(
                f"<tr><td>{escape(row.name)}<td>{escape(', '.join(row.pattern))}<td>{row.train_flops:,}"
                f"<td>{row.largest_rise:.3f}<td>{row.cache_bytes_per_token:,} B<td>{row.cache_bytes_fixed:,} B"
                for row in comparison.rows
            ),
            "</table><p class=dim>FLOP of forward and backward. Largest rise: how far the training loss, the mean of",
            "five reports, ever stood above its lowest before, nats a token. Cache: bytes of one row, decoding.</p>",
            *(_sample(comparison.out / row.name, row.name) for row in comparison.rows),
            "</html>\n",
        ]
    )


def _sample(run: Path, name: str) -> str:
    samples = sorted((run / "samples").glob("*.txt"))
    if not samples:
        return ""
    return f"<h2>A sample of {escape(name)}</h2><pre>{escape(samples[-1].read_text(encoding='utf-8'))}</pre>"


def _inline(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
