"""What `jaxlm plan` shows, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxlm import config
from jaxlm.plan.search import MakePlan, search_plans
from jaxlm.plan.sharding import describe
from jaxlm.plan.topology import Topology


def plan_all(
    cfg: config.Config,
    topology: Topology,
    make_plan: MakePlan,
    *,
    search: bool,
    show_sharding: bool,
) -> Iterator[Any]:
    """What `jaxlm plan` shows, part by part: tables, and lines of text."""
    if show_sharding:
        yield describe(cfg, topology.devices, topology.slices)
    if search:
        ranking = search_plans(cfg, topology, make_plan)
        yield ranking
        yield f"best: {ranking.best}"  # as it is, since a table would break the line
    else:
        yield make_plan(cfg, topology)
