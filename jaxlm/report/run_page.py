"""`report.html`: one self-contained page that shows how a run went."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.config import toml
from jaxlm.report.page import inline, newest_sample, render
from jaxlm.report.plots import plot_loss, plot_measures, plot_time
from jaxlm.report.stage_parts import pairs_of, samples_of

Row = Mapping[str, Any]
UNITS = {
    "tokens_per_second": "tokens/s, whole run",
    "mfu": "of the peak, whole run",
    "goodput": "of the time",
    "validation_bits_per_byte": "bits",
    "validation_divergence": "from the teacher",
    "unigram_loss": "nats a token",
    "validation_chosen_logp": "nats an answer",
    "answer_nll": "nats a token of the right answers",
    "entropy": "nats a token",
    "length": "tokens a sample",
    "ended": "of the samples ended by themselves",
}
SHOWN = ("step", "tokens", "loss", "tokens_per_second", "mfu", "goodput", "validation_loss", "validation_perplexity",
         "validation_divergence", "validation_bits_per_byte", "validation_accuracy", "validation_margin",
         "validation_chosen_logp", "reward", "held_out_reward", "answer_nll", "entropy", "length",
         "ended")  # fmt: skip
SHARES = ("mfu", "goodput", "validation_accuracy", "ended")


def write_report(
    cfg: config.Config,
    rows: Sequence[Row],
    baseline: float | None = None,
    *,
    baseline_name: str = "unigram baseline",
    loss_unit: str = "nats a token",
) -> Path:
    """Draw the plots of the run at `cfg.out_dir`, and write its page: figures, plots, newest sample and config.

    Args:
        rows: of `metrics.jsonl`.
        baseline: the headline of a trivial model, if there is one.
    """
    run_dir = Path(cfg.out_dir)
    plots = run_dir / "plots"
    plot_loss(rows, plots / "loss.png", baseline, baseline_name, unit=loss_unit)
    plot_measures(rows, plots / "measures.png")
    plot_time(rows, plots / "time.png")
    page = render(
        "run.html",
        title=run_dir.name,
        figures=list(_figures(rows, baseline, loss_unit)),
        loss=inline(plots / "loss.png"),
        measures=inline(plots / "measures.png"),
        time=inline(plots / "time.png"),
        pairs=pairs_of(run_dir),
        phases=samples_of(run_dir),
        sample=newest_sample(run_dir) or "none",
        config=toml.to_toml(cfg),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def whole_run(rows: Sequence[Row]) -> dict[str, float]:
    """`tokens_per_second` and `mfu` over all reports, each weighed by the time that its steps took."""
    timed = [row for row in rows if row.get("tokens_per_second")]
    counts = [max(0, b["tokens"] - a["tokens"]) for a, b in itertools.pairwise([{"tokens": 0}, *timed])]
    seconds = [count / row["tokens_per_second"] for count, row in zip(counts, timed, strict=True)]
    if not sum(seconds):
        return {}
    busy = sum(time * row.get("mfu", 0.0) for time, row in zip(seconds, timed, strict=True))
    return {"tokens_per_second": sum(counts) / sum(seconds), "mfu": busy / sum(seconds)}


def _figures(rows: Sequence[Row], baseline: float | None, loss_unit: str) -> Iterator[tuple[str, str]]:
    """The newest value of each figure, in words and with its unit; speeds are those of the whole run."""
    newest: dict[str, Any] = {}
    for row in rows:
        newest |= row
    newest |= whole_run(rows)
    if baseline is not None:
        newest["unigram_loss"] = baseline
    parts = sorted(name for name in newest if name.startswith(("validation_loss_", "share_")))
    for name in (*SHOWN, *parts, "unigram_loss"):
        if newest.get(name) is not None:
            unit = loss_unit if name in ("loss", "validation_loss") else UNITS.get(name, "")
            yield name.replace("_", " "), f"{_number(name, newest[name])} {unit}".strip()


def _number(name: str, value: int | float) -> str:
    if name in SHARES or name.startswith("share_"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
