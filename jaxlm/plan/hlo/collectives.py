"""The collectives of a compiled program: what they carry, how often, and along which axes of the mesh.

    for one in collectives(hlo.parse(compiled.as_text()), layout.mesh.shape):
        one.kind, one.axes, one.times * one.moved

Devices are numbered as they stand in the mesh, which is how `jit` assigns them. Bytes are those of one device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxlm.plan.hlo.program import Program
from jaxlm.plan.hlo.text import Computation, Instruction

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """One instruction that all devices of a group run together."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the members of a group differ; empty: it moves nothing."""
    members: int
    """Devices of a group."""
    groups: np.ndarray
    """Their places in the mesh [groups, members]; of a permutation, the pairs."""
    operand_bytes: int
    times: int
    """How often it runs in one call."""
    op_name: str
    """The JAX operation that it comes from."""

    @property
    def result_bytes(self) -> int:
        """What one device holds afterwards."""
        share = {"all-gather": self.members, "reduce-scatter": 1 / self.members}
        return int(self.operand_bytes * share.get(self.kind, 1))

    @property
    def moved(self) -> int:
        """Bytes that one device sends in one run of the best algorithm (Chan et al. 2007, table 1)."""
        others = (self.members - 1) / self.members
        share = {
            "all-reduce": 2 * others,
            "all-gather": self.members - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return int(self.operand_bytes * share.get(self.kind, others)) if self.axes else 0


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that runs on a mesh with these axis sizes, in the order of the text."""
    found = []
    for times, computation, one in program.walk():
        kind = one.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        # On TPUs a reduce-scatter appears as the fusion of an all-reduce with a slice: half the bytes of what its
        # opcode says.
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"  # how the TPU compiler writes it: a fusion of the sum and the slice
        groups = groups_of(one.attributes, math.prod(mesh.values()))
        axes, members = _axes(groups, mesh)
        members = members if kind == "collective-permute" else groups.shape[1]
        found.append(Collective(kind, axes, members, groups, _operand_bytes(computation, one), times, one.op_name))
    return found


def moved_by(found: list[Collective]) -> dict[tuple[str, tuple[str, ...]], int]:
    """Bytes that one device sends in one call, for each kind and mesh axes."""
    sums: dict[tuple[str, tuple[str, ...]], int] = {}
    for one in found:
        if one.axes:
            sums[one.kind, one.axes] = sums.get((one.kind, one.axes), 0) + one.times * one.moved
    return sums


def _operand_bytes(computation: Computation, one: Instruction) -> int:
    known = (computation.instructions.get(name) for name in one.operands)
    return sum(operand.bytes for operand in known if operand is not None)


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """Who talks to whom [groups, members], of the four ways to write it; of a permutation, its pairs."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _explicit(pairs.group(1) + "}")
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota.group(1))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", attributes):
        return _of_mesh(*mesh.groups())
    if explicit := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _explicit(explicit.group(1))
    return np.arange(devices)[None]


def _explicit(text: str) -> np.ndarray:
    """`{0,1},{2,3}`."""
    return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}?", text)])


def _iota(text: str) -> np.ndarray:
    """`[8,64]<=[64,8]T(1,0)`: numbers in the shape after `<=`, transposed, read in the first shape if there is one."""
    *shape, source = (tuple(map(int, part.split(","))) for part in re.findall(r"\[([\d,]+)\]", text))
    order = re.search(r"T\(([\d,]+)\)", text)
    # The compact form is a numbering of a box, its axes exchanged and cut into rows of one group: exactly reshape,
    # transpose, reshape.
    counted = np.arange(math.prod(source)).reshape(source)
    counted = counted.transpose([int(i) for i in order.group(1).split(",")]) if order else counted
    return counted.reshape(shape[0]) if shape else counted


def _of_mesh(sizes: str, between: str, axes: str) -> np.ndarray:
    """`mesh['a'=64,'b'=8] {'a'}`, or of an axis only a part: `'a':(2)4` is what varies after the first 2."""
    # An axis of which only a part takes part is split into before, part and behind; grouped are the named pieces alone.
    dims, names = [], []
    parts = {name: (int(pre), int(size)) for name, pre, size in re.findall(r"'?([^',]+)'?:\((\d+)\)(\d+)", axes)}
    whole = re.findall(r"'?([^',:(){}]+)'?(?=,|$)", axes)
    for name, text in re.findall(r"'?([^',=]+)'?=(\d+)", sizes):
        size = int(text)
        if name in parts:
            before, part = parts[name]
            dims += [before, part, size // before // part]
            names += ["", name, ""]
        else:
            dims.append(size)
            names.append(name if name in whole else "")
    devices = re.search(r"device_ids=\(?((?:\[[\d,]+\]<=)?\[[\d,]+\](?:T\([\d,]+\))?)", between)
    ids = _iota(devices.group(1)).reshape(dims) if devices else np.arange(math.prod(dims)).reshape(dims)
    # The grouped dimensions go last, so that each row of the result is one group.
    grouped = [i for i, name in enumerate(names) if name]
    rest = [i for i, name in enumerate(names) if not name]
    return ids.transpose(rest + grouped).reshape(-1, math.prod(dims[i] for i in grouped))


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes along which the members of a group differ, and how many devices these have together."""
    # Coordinates of every member in the mesh. An axis along which any group varies is one that the collective talks
    # along.
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())))
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(name for name, differs in zip(mesh, varies, strict=True) if differs)
    return axes, math.prod(mesh[name] for name in axes)
