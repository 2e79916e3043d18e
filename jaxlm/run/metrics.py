"""What a run reports: `metrics.jsonl`, optional TensorBoard and Weights & Biases, a progress bar, a loss plot.

Nothing here imports jax or torch. Losses are in nats a token.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.errors import UserError

SECONDS = "seconds_"
"""Begins the names of what `clock.Window` counts."""
OF_THE_MACHINE = re.compile(r"tokens_per_second|mfu|goodput|step_seconds|(seconds|memory|late_process)_.+")
"""Names of what another run with the same numbers has otherwise."""
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def memory_of_process() -> dict[str, int]:
    """Resident bytes of this process, now (where the system tells) and at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return {"memory_peak_bytes": peak}
    now = pages * resource.getpagesize()
    return {"memory_bytes": now, "memory_peak_bytes": max(now, peak)}  # Linux counts the two at different moments


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
