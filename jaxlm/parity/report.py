"""The verdict, the table on the terminal and the JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxlm import __version__, config
from jaxlm.convert.canonical import leaves
from jaxlm.errors import UserError
from jaxlm.parity.bisect import Part, first_guilty
from jaxlm.parity.compare import GENERATION, Finding, cell_text
from jaxlm.parity.page import page

OPTIONS = 3
"""How many options of the configs a verdict names."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Report:
    """What was compared and what came out."""

    subject: str
    """Which model."""
    model: str
    """Its architecture, in words."""
    inputs: str
    """What it was shown."""
    findings: tuple[Finding, ...]
    """In the order of computation, float64 first."""
    seconds: Mapping[str, float]
    """How long each part took; the parts of the two frameworks overlap."""
    who: str = "jaxlm against torch_ref"
    """Which model is computed by what."""
    parts: tuple[Part, ...] = ()
    """Every operation replayed on the same input, in the dtype in which the outputs differ first."""
    explanations: tuple[str, ...] = ()
    """What makes the difference vanish, best first."""
    notes: tuple[str, ...] = ()
    """What was not compared, and why."""
    unfinished: bool = False
    """Whether more is to be compared: what is known so far, should the comparison be ended."""
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: versions())
    machine: str = dataclasses.field(default_factory=lambda: machine())
    date: str = dataclasses.field(default_factory=lambda: f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")

    @property
    def same(self) -> bool:
        """Whether the comparison came to its end and every finding keeps its bound."""
        return not self.unfinished and self.keeps_bounds

    @property
    def keeps_bounds(self) -> bool:
        """Whether every finding so far keeps its bound."""
        return all(finding.ok for finding in self.findings)

    @property
    def first(self) -> Finding | None:
        """The first tensor that differs in the order of computation, different mathematics before rounding."""
        return next((finding for finding in self.findings if not finding.ok and finding.level != "config"), None)

    @property
    def guilty(self) -> Part | None:
        """The first operation that is wrong on the right input."""
        return first_guilty([*self.parts])

    @property
    def last_same(self) -> Finding | None:
        """The value computed just before the first difference, when it belongs to the same level."""
        before = self.findings[: self.findings.index(self.first)] if self.first else ()
        return before[-1] if before and before[-1].level == self.findings[len(before)].level else None

    @property
    def verdict(self) -> str:
        """One line: `same`, or the options and the first tensor that differ, and what is to blame."""
        if self.keeps_bounds:
            return f"unfinished: the same so far, in {', '.join(self.dtypes)}" if self.unfinished else "same"
        options = [finding for finding in self.findings if finding.level == "config" and not finding.ok]
        parts = [f"{finding.name} is {finding.note}" for finding in options[:OPTIONS]]
        parts += [f"{len(options) - OPTIONS} more options"] if len(options) > OPTIONS else []
        parts += [self._first_difference(self.first)] if self.first else []
        parts += [f"first guilty: {self.guilty.what}"] if self.guilty else []
        words = "unfinished: they differ: " if self.unfinished else "differ: "
        return words + "; ".join([*parts, *self.explanations[:1]])

    def _first_difference(self, first: Finding) -> str:
        words = f"first differing tensor {first.name} ({first.dtype}, {first.level}): "
        if first.level == GENERATION:
            return words.replace("tensor", "tokens") + first.note
        if first.note and not math.isfinite(first.error):
            return words + first.note
        last = f"; {self.last_same.name} before it is the same" if self.last_same else ""
        return f"{words}relative error {first.error:.1e}, bound {first.bound:.1e}{last}"

    def worst(self, level: str, dtype: str) -> Finding | None:
        """The finding that comes nearest to its bound, or exceeds it most."""
        of_both = [finding for finding in self.findings if (finding.level, finding.dtype) == (level, dtype)]
        return max(of_both, key=lambda finding: finding.share, default=None)

    @property
    def levels(self) -> list[str]:
        """In the order of computation."""
        return _distinct(finding.level for finding in self.findings)

    @property
    def dtypes(self) -> list[str]:
        """The widest first, after what is stored."""
        return _distinct(finding.dtype for finding in self.findings)

    @property
    def slowest(self) -> str:
        """What took the time, in words."""
        parts = sorted(((s, name) for name, s in self.seconds.items() if name != "all"), reverse=True)[:3]
        return f"{self.seconds.get('all', 0.0):.0f} s, most of it " + "; ".join(
            f"{name} {s:.0f} s" for s, name in parts
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; an infinite error is null."""
        names = ("subject", "who", "model", "inputs", "date", "machine")
        return {
            "same": self.same,
            "verdict": self.verdict,
            **{name: getattr(self, name) for name in names},
            "versions": dict(self.versions),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "guilty": self.guilty.what if self.guilty else None,
            "explanations": list(self.explanations),
            "notes": list(self.notes),
            "replayed": [{**dataclasses.asdict(part), "ok": part.ok} for part in self.parts],
            "findings": [{**dataclasses.asdict(finding), "ok": finding.ok} for finding in self.findings],
        }

    def write(self, folder: str | Path) -> list[Path]:
        """Write `parity.json` and `parity.html` into a folder.

        Raises:
            UserError: the folder cannot be written to.
        """
        folder = Path(folder)
        files = {
            folder / "parity.json": json.dumps(_finite(self.as_dict()), indent=1, allow_nan=False) + "\n",
            folder / "parity.html": page(self),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, content in files.items():
                path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}", "name another folder with --out") from None
        return list(files)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.subject, caption="relative error ≤ bound, of the tensor nearest to its bound")
        table.add_column("level")
        for dtype in self.dtypes:
            table.add_column(dtype)
        for level in self.levels:
            cells = [self.worst(level, dtype) for dtype in self.dtypes]
            table.add_row(level, *(Text(_cell(cell), style=_style(cell)) for cell in cells))
        verdict = Text(self.verdict, style="bold green" if self.same else "bold red", overflow="fold")
        lines = [*self.explanations[1:], *self.notes, self.who, f"{self.model}; {self.inputs}; {self.slowest}"]
        return Group(table, verdict, *(Text(line, style="dim", overflow="fold") for line in lines))


def describe(model: config.Model) -> str:
    """The architecture in words."""
    count = sum(_size(leaf.shape) for leaf in leaves(model).values())
    heads = f"{model.n_heads} heads on {model.n_kv_heads} kv heads"
    says = "" if model.head == "lm" else f", {model.head} head"
    return (
        f"{count:,} parameters, {model.n_layers} layers of {' '.join(model.pattern)}, width {model.d_model}, {heads}, "
        f"{model.positions}, {model.norm}, {model.activation}, vocabulary {model.vocab_size:,}{says}"
    )


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    installed = {name for name in PACKAGES if importlib.util.find_spec(name)}
    found = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return {"jaxlm": __version__, "python": platform.python_version(), **found}


def machine() -> str:
    """Where they were computed."""
    import jax

    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, jax on {jax.devices()[0].device_kind}"


def _cell(finding: Finding | None) -> str:
    return f"{'✓' if finding.ok else '✗'} {cell_text(finding)}" if finding else ""


def _style(finding: Finding | None) -> str:
    return "red" if finding and not finding.ok else ""


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
