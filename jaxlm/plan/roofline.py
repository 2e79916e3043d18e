"""How long a step takes at least and at most, from what it computes, moves in memory and sends over the mesh.

A lower and an upper bound ("How to Scale Your Model", Austin et al. 2025, chapter 1): everything overlaps, and nothing
does. Real steps lie between; latencies, stragglers and data are in neither.
"""

from __future__ import annotations

import dataclasses

from jaxlm.plan.chips import Chip
from jaxlm.plan.compile_elsewhere import Measured


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    compute: float
    """Its FLOP at the chip's peak."""
    memory: float
    """Its traffic with the chip's memory at full bandwidth."""
    busy: float
    """Its operations one after another, each limited by the one or the other."""
    axes: dict[str, float]
    """What collectives take along each axis of the mesh, or several together, written `fsdp+tensor`."""

    @property
    def best(self) -> float:
        """Everything overlaps: the slowest of all."""
        return max(self.compute, self.memory, *self.axes.values(), 0.0)

    @property
    def worst(self) -> float:
        """Nothing overlaps: collectives wait for operations and for one another."""
        return self.busy + sum(self.axes.values())

    @property
    def limit(self) -> str:
        """What is slowest."""
        named = {"compute": self.compute, "memory bandwidth": self.memory}
        named |= {f"links along {axis}": seconds for axis, seconds in self.axes.items()}
        return max(named, key=lambda name: named[name])


def times(measured: Measured, chip: Chip) -> Times:
    """The bounds of a compiled step."""
    # Collectives along one axis share its links and follow one another; along different axes they may run side by side.
    # So times are added by axis.
    axes: dict[str, float] = {}
    for one in measured.traffic:
        name = "+".join(one.axes)
        axes[name] = axes.get(name, 0.0) + one.bytes / one.bandwidth
    return Times(
        compute=measured.flops / chip.flops,
        memory=measured.memory_traffic / chip.hbm_bandwidth,
        busy=measured.busy_seconds,
        axes=dict(sorted(axes.items(), key=lambda item: -item[1])),
    )
