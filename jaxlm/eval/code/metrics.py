"""A report of figures that are no pass@k: each with its interval, and trivial baselines beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxlm.eval.code.estimate import Estimate
from jaxlm.sandbox.choose import BACKENDS


def lower_bound(sandbox: str) -> bool:
    """Whether right answers may fail in a sandbox, since its Python is not all of Python."""
    return sandbox in BACKENDS and BACKENDS[sandbox].lower_bound


def isolation(sandbox: str) -> dict[str, Any]:
    """What a report says of the sandbox that judged, as plain data; nothing where no program was run."""
    made: dict[str, Any] = {"sandbox": sandbox} if sandbox else {}
    made |= {"isolated": False} if sandbox == "none" else {}
    return made | ({"lower_bound": True} if lower_bound(sandbox) else {})


def marks(sandbox: str) -> str:
    """The same for the title of a table."""
    return " NOT ISOLATED" if sandbox == "none" else ": LOWER BOUNDS" if lower_bound(sandbox) else ""


@dataclass(frozen=True)
class MetricReport:
    """The figures of one task."""

    task: str
    n: int
    """Items that were judged."""
    items: str
    """Their plural, such as `lines of 12 files`."""
    scores: Mapping[str, Estimate]
    """The figures of the model by name."""
    baselines: Mapping[str, Mapping[str, Estimate]]
    """The same figures of something trivial, by its name."""
    protocol: str
    """How an answer was taken and compared, in a line."""
    counts: Mapping[str, int] = field(default_factory=dict)
    sandbox: str = ""
    """Where programs were run, if any."""

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""

        def table(scores: Mapping[str, Estimate]) -> dict[str, Any]:
            return {name: score._asdict() for name, score in scores.items()}

        head = {"task": self.task, "n": self.n, "items": self.items, "protocol": self.protocol}
        baselines = {name: table(scores) for name, scores in self.baselines.items()}
        scores = {"scores": table(self.scores), "baselines": baselines, "counts": dict(self.counts)}
        return {**head, **scores, **isolation(self.sandbox)}

    def __rich__(self) -> Any:
        from rich.table import Table

        judged = f", bugs found in {self.sandbox}{marks(self.sandbox)}" if self.sandbox else ""
        table = Table(title=f"{self.task}: {self.n:,} {self.items}{judged}\n{self.protocol}", title_justify="left")
        for name in ("", "model", *self.baselines):
            table.add_column(name, justify="right")
        for name, score in self.scores.items():
            row = [score, *(scores[name] for scores in self.baselines.values())]
            table.add_row(name, *map(shown, row))
        table.add_section()
        for name, count in self.counts.items():
            table.add_row(name, f"{count:,}")
        return table


def shown(score: Estimate) -> str:
    """A share in per cent with its interval."""
    return f"{score.value:.1%} [{score.low:.1%}, {score.high:.1%}]"
