"""The named configurations as a table, each counted from its shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxlm.config import registry, toml
from jaxlm.counts.parameters import parameters


@dataclasses.dataclass(frozen=True)
class Named:
    """One of `configs/models`."""

    name: str
    aliases: tuple[str, ...]
    total: int
    active: int
    pattern: tuple[str, ...]
    repeats: int


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """All of `configs/models`, smallest first."""

    rows: tuple[Named, ...]

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("name", no_wrap=True, min_width=max(len(row.name) for row in self.rows))
        table.add_column("aliases", min_width=max(len(alias) for row in self.rows for alias in row.aliases))
        table.add_column("parameters", justify="right", no_wrap=True, min_width=10)
        table.add_column("active", justify="right", no_wrap=True, min_width=8)
        table.add_column("pattern", overflow="fold")
        for row in self.rows:
            active = f"{row.active / 1e6:,.1f}M" if row.active != row.total else ""
            pattern = f"{row.repeats}x {', '.join(row.pattern)}"
            table.add_row(row.name, ", ".join(row.aliases), f"{row.total / 1e6:,.1f}M", active, pattern)
        return table


def catalogue() -> Catalogue:
    """Count every named configuration; nothing is allocated."""
    return Catalogue(tuple(sorted(_rows(), key=lambda row: row.total)))


def _rows() -> Iterator[Named]:
    for path, aliases in registry.entries().items():
        model = toml.load(path).model
        total, active = parameters(model)
        yield Named(path.stem, aliases, total, active, model.pattern, model.repeats)
