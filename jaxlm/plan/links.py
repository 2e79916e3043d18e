"""How fast a group of chips exchanges what a collective carries: bytes a second that each of them can send.

A TPU sends along every dimension of the torus in which its group extends, both ways where the group closes the ring. A
GPU sends through its switch, and to other hosts through its network card. What crosses slices or hosts is shared by the
members on the same side (hierarchical collectives; "How to Scale Your Model", Austin et al. 2025, chapters 2 and 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.plan.topology import Topology


def bandwidth(group: Sequence[int], devices: Sequence[Any], topology: Topology, *, one_way: bool = False) -> float:
    """Bytes a second out of each member of `group`, places among `devices` in the order of the mesh.

    Args:
        one_way: a permutation, which uses one direction of one link.
    """
    # All groups of a mesh axis look alike, so one group stands for all of them.
    chip, members = topology.chip, [devices[i] for i in group]
    if len(members) < 2:
        return float("inf")
    # Members on one side talk over the fast links. What must leave the side is shared by the members there, each with
    # its own network card: so the network counts once for each of them, and the slower of the two paths decides.
    sides = [_side(device, topology) for device in members]
    inner = [one for one, side in zip(members, sides, strict=True) if side == sides[0]]
    fast = chip.link
    if len(inner) > 1 and chip.platform == "tpu" and not one_way:
        fast = chip.link * _directions(inner, topology)
    return fast if len(set(sides)) == 1 else min(fast, chip.network * len(inner))


def _side(device: Any, topology: Topology) -> int:
    """What the fast links end at: the slice of a TPU, the host of a GPU."""
    if topology.chip.platform == "tpu":
        return device.slice_index if topology.slices > 1 and hasattr(device, "slice_index") else 0
    return device.id // topology.chip.host


def _directions(members: Sequence[Any], topology: Topology) -> int:
    """Links that a chip sends on: one for each dimension in which the members extend, two where they close a ring."""
    if not hasattr(members[0], "coords"):  # virtual devices: as if the axis had one dimension to itself
        side = max(topology.shape)
        return 2 if len(members) >= side and side % topology.chip.wrap == 0 else 1
    # In how many coordinates the members differ is the number of torus dimensions they extend in; a ring closes if they
    # fill a side that has wrap-around links.
    places = np.array([device.coords[: topology.chip.dims] for device in members])
    extents = [len(np.unique(axis)) for axis in places.T]
    rings = [n == side and side % topology.chip.wrap == 0 for n, side in zip(extents, topology.shape, strict=True)]
    return max(1, sum((2 if ring else 1) for n, ring in zip(extents, rings, strict=True) if n > 1))
