"""The named configurations as a table, each counted from its shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxlm import config_file, registry
from jaxlm.models.accounting import parameters


@dataclasses.dataclass(frozen=True)
class Named:
    """One of `configs/models`."""

    name: str
    aliases: tuple[str, ...]
    total: int
    active: int
    pattern: tuple[str, ...]
    n_layers: int
    d_model: int


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """All of `configs/models`, smallest first."""

    rows: tuple[Named, ...]

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("name", "aliases", "parameters", "active", "blocks", "width", "pattern")
        for row in self.rows:
            counts = (f"{row.total:,}", f"{row.active:,}" if row.active != row.total else "")
            sizes = (str(row.n_layers), str(row.d_model))
            table.add_row(row.name, ", ".join(row.aliases), *counts, *sizes, ", ".join(row.pattern))
        for column in table.columns[2:6]:
            column.justify = "right"
        return table


def catalogue() -> Catalogue:
    """Count every named configuration; nothing is allocated."""
    return Catalogue(tuple(sorted(_rows(), key=lambda row: row.total)))


def _rows() -> Iterator[Named]:
    for path, aliases in registry.entries().items():
        model = config_file.load(path).model
        total, active = parameters(model)
        yield Named(path.stem, aliases, total, active, model.pattern, model.n_layers, model.d_model)
