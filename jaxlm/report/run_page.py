"""`report.html`: one self-contained page that shows how a run went."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.config import toml

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}
td{padding:.15rem 1rem .15rem 0}td+td{font-variant-numeric:tabular-nums}img{max-width:100%}
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:13px;line-height:1.35}"""

_SHOWN = ("step", "tokens", "loss", "tokens_per_second", "mfu", "goodput", "validation_loss", "validation_perplexity",
          "validation_bits_per_byte", "validation_accuracy")  # fmt: skip


def write_report(cfg: config.Config, rows: list[dict[str, Any]], baseline: float | None) -> Path:
    """Write the page of the run at `cfg.out_dir` from its metrics, its plot, its newest samples and its config.

    Args:
        rows: of `metrics.jsonl`.
        baseline: the headline of a trivial model, if there is one.
    """
    run_dir = Path(cfg.out_dir)
    newest: dict[str, Any] = {}
    for row in rows:
        newest |= row
    shown = [*_SHOWN, *sorted(name for name in newest if name.startswith(("validation_loss_", "share_")))]
    newest = {name: newest[name] for name in shown if newest.get(name) is not None}
    if baseline is not None:
        newest["unigram_loss"] = baseline
    cells = "".join(f"<tr><td>{name.replace('_', ' ')}<td>{_number(value)}" for name, value in newest.items())
    samples = sorted((run_dir / "samples").glob("*.txt"))
    sample = samples[-1].read_text(encoding="utf-8") if samples else "none"
    page = "\n".join(
        [
            f"<!doctype html><meta charset=utf-8><title>{html.escape(run_dir.name)}</title><style>{_STYLE}</style>",
            f"<h1>{html.escape(run_dir.name)}</h1><table>{cells}</table>",
            f'<h2>Loss</h2><img alt="loss against step" src="{_inline(run_dir / "plots" / "loss.png")}">',
            f"<h2>Time</h2>{_shares(run_dir / 'plots' / 'time.png')}",
            f"<h2>Sample</h2><pre>{html.escape(sample)}</pre>",
            f"<h2>Config</h2><pre>{html.escape(toml.to_toml(cfg))}</pre>",
        ]
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _shares(plot: Path) -> str:
    return f'<img alt="shares of time against step" src="{_inline(plot)}">' if plot.exists() else "none"


def _inline(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
