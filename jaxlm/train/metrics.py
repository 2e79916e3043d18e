"""What a run reports: `metrics.jsonl`, optional TensorBoard and Weights & Biases, a progress bar, a loss plot.

Nothing here imports jax or torch. Losses are in nats a token.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlm import config
from jaxlm.errors import UserError

PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal
PEAK_FLOPS = {  # dense bfloat16, vendors' figures, FLOP/s of one device by the name that both frameworks give it
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of either framework as floats, and arrays as lists."""
    return {name: value.tolist() if value.ndim else float(value) for name, value in metrics.items()}


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl`, and passes it on where the config asks for it.

    Of several processes one `writes`.
    """

    def __init__(
        self, run_dir: Path, log: config.Log, resolved: dict[str, Any], resume_step: int, *, writes: bool = True
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._file, self._board, self._wandb = None, None, None
        if not writes:
            return
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(run_dir) if log.tensorboard else None
        self._wandb = _wandb(run_dir, log.wandb, resolved) if log.wandb else None

    def write(self, row: dict[str, Any]) -> None:
        """Record one row; it has a `step`."""
        if self._file is None:
            return
        self._file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
        self._file.flush()
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, row["step"])
        if self._wandb:
            self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Flush everything."""
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


class Display:
    """The progress bar on a terminal; a line every few seconds elsewhere; nothing if it is to be quiet."""

    def __init__(self, total: int, start: int, *, quiet: bool = False) -> None:
        self.console, self._quiet = Console(stderr=True, quiet=quiet), quiet
        self._total, self._printed = total, 0.0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, status="compiling")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def status(self, row: dict[str, Any]) -> None:
        """Show the latest metrics."""
        text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s  MFU {row['mfu']:.1%}"
        self._bar.update(self._task, status=text)
        if not self._quiet and not self.console.is_terminal and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            print(f"step {row['step']}/{self._total}  {text}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_loss(rows: list[dict[str, Any]], path: Path, baseline: float | None = None) -> None:
    """Draw training and validation loss against the step into a PNG, with the unigram baseline if there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=144)
    for key, style in (("loss", {"lw": 1, "alpha": 0.7}), ("validation_loss", {"lw": 2, "marker": "o", "ms": 4})):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    if baseline is not None and math.isfinite(baseline):
        axes.axhline(baseline, color="grey", ls="--", lw=1, label="unigram baseline")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(run_dir: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard needs tensorboardX", "pip install 'jaxlm[tensorboard]'") from None
    return SummaryWriter(str(run_dir / "tensorboard"))


def _wandb(run_dir: Path, project: str, resolved: dict[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("log.wandb needs wandb", "pip install 'jaxlm[wandb]'") from None
    return wandb.init(project=project, dir=str(run_dir), name=run_dir.name, config=resolved, resume="allow")
