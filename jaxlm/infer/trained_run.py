"""A run directory in use: what `jaxlm.train` returns.

run = jaxlm.Run("runs/quickstart")
run.metrics[-1]["loss"], run.column("validation_loss"), run.checkpoints
run.model().generate("def add(a, b):")
"""

from __future__ import annotations

import dataclasses
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError, did_you_mean
from jaxlm.run.checkpoints import checkpoint_steps
from jaxlm.run.metrics import read_metrics

if TYPE_CHECKING:
    from jaxlm.infer.load import Dtype
    from jaxlm.infer.model import Model

_SHOWN = ("step", "loss", "validation_loss", "tokens_per_second", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, by its folder. Everything is read when it is asked for, so a run that goes on shows it."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        """Take the run at `path`.

        Raises:
            UserError: there is none.
        """
        object.__setattr__(self, "path", Path(path))
        if not (self.path / "config.toml").is_file():
            raise UserError(
                f"{self.path}: not a run", "looked for config.toml; `jaxlm.train` or `jaxlm train` makes one"
            )

    @property
    def config(self) -> config.Config:
        """The resolved config."""
        return toml.load(self.path / "config.toml")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, each with a `step`: `pandas.DataFrame(run.metrics)` is a table of them."""
        return read_metrics(self.path / "metrics.jsonl")

    def column(self, name: str) -> tuple[list[int], list[Any]]:
        """Steps at which a metric was reported, and its values.

        Raises:
            UserError: no row has it.
        """
        rows = self.metrics
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if not points:
            known = {key for row in rows for key in row}
            raise UserError(f"{self.path / 'metrics.jsonl'}: no {name!r}", did_you_mean(name, known))
        return [step for step, _ in points], [value for _, value in points]

    @property
    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return checkpoint_steps(self.path)

    def model(
        self, step: int | None = None, *, dtype: Dtype | None = None, mesh: str | config.Mesh | None = None
    ) -> Model:
        """The model of a checkpoint (default: the newest). See `jaxlm.load` for the arguments.

        Raises:
            UserError: as `jaxlm.load`.
        """
        from jaxlm.infer.load import load

        return load(self.path, dtype=dtype, mesh=mesh, step=step)

    def __str__(self) -> str:
        rows = self.metrics
        losses = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
        loss = f", validation loss {losses[-1]:.4f}" if losses else ""
        return f"{self.path}: step {rows[-1]['step'] if rows else 0}{loss}, checkpoints {self.checkpoints}"

    def _repr_html_(self) -> str:
        names = [name for name in _SHOWN if any(name in row for row in self.metrics)]
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(row.get(name))}</td>" for name in names) + "</tr>"
            for row in self.metrics[-12:]
        )
        return f"<p>{escape(str(self))}</p><table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else escape(str(value))
