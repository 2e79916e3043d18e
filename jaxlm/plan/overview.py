"""What `jaxlm plan` shows, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxlm import config
from jaxlm.plan.plan_one import make
from jaxlm.plan.search import search_plans
from jaxlm.plan.sharding import describe
from jaxlm.plan.topology import Topology


def plan_all(
    cfg: config.Config,
    topology: Topology,
    *,
    search: bool,
    show_sharding: bool,
    name: str = "",
    tokens: float = 0.0,
    price: float | None = None,
    compiling: bool = True,
) -> Iterator[Any]:
    """What `jaxlm plan` shows, part by part: tables, and lines of text; see `make` for the arguments."""
    if show_sharding:
        yield describe(cfg, topology.devices, topology.slices)
    if search:
        ranking = search_plans(cfg, topology, name=name, tokens=tokens, price=price, compiling=compiling)
        yield ranking
        yield f"best: {ranking.best}"  # as it is, since a table would break the line
    else:
        yield make(cfg, topology, name=name, tokens=tokens, price=price, compiling=compiling)
