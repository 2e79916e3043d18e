"""Compiled HLO text read as a program: how often each instruction runs, its FLOP, its traffic, its collectives.

XLA's own `cost_analysis` counts the body of a loop once; here everything is multiplied by the trip counts.

    program = parse(compiled.as_text())
    program.flops()                      # of one device in one step
    collectives(program, layout.mesh.shape)

Bytes and FLOP are those of one device. Sources: `xla/hlo/ir/hlo_instruction.cc` (the text),
`xla/service/hlo_cost_analysis.cc` (FLOP of a convolution).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxlm.plan.hlo import kernels
from jaxlm.plan.hlo.kernels import Count
from jaxlm.plan.hlo.text import Array, Computation, Instruction, called_by, operand, option, read_computations

_KNOWN = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_MOVERS = {
    "while",
    "call",
    "conditional",
    "tuple",
    "get-tuple-element",
    "parameter",
    "constant",
    "bitcast",
    "after-all",
}
"""Instructions that move nothing themselves."""
_TALKERS = (
    "all-",
    "reduce-scatter",
    "collective-",
    "ragged-all",
    "async-",
    "send",
    "recv",
    "partition-id",
    "replica-id",
)


class Flops(NamedTuple):
    """FLOP of the matrix products and convolutions of one device in one step."""

    total: int
    recomputed: int
    """Of these, what the backward pass computes for the second time (remat)."""


class Program(NamedTuple):
    """A compiled module."""

    computations: Mapping[str, Computation]
    runs: Mapping[str, int]
    """How often each computation runs in one call; a loop whose trip count depends on data counts as one turn."""
    unknown_loops: tuple[str, ...]
    """Loops whose trip count depends on data, but those that are idle."""
    grouped_rows: int
    """Rows of a grouped product that belong to a group; 0: all."""

    def walk(self) -> Iterator[tuple[int, Computation, Instruction]]:
        """Every instruction that runs, and how often."""
        for name, computation in self.computations.items():
            times = self.runs.get(name, 0)
            if times:
                for one in computation.instructions.values():
                    yield times, computation, one

    def flops(self) -> Flops:
        """Matrix products, convolutions, and what custom kernels say that they cost."""
        total = recomputed = 0
        for times, computation, one in self.walk():
            count, again = self._flops(computation, one)
            total += times * count
            recomputed += times * (count if "rematted_computation" in one.op_name else again)
        return Flops(total, recomputed)

    def traffic(self) -> int:
        """Bytes between the chip and its memory: operands and results outside fusions, less what stays on the chip."""
        return sum(times * moved for times, moved, _ in self._operations())

    def busy(self, flops: float, bandwidth: float) -> float:
        """Seconds that a chip computes if its operations follow one another, each at its own roofline.

        Args:
            flops, bandwidth: FLOP and bytes that the chip does in a second.
        """
        return sum((times * max(moved / bandwidth, count / flops) for times, moved, count in self._operations()), 0.0)

    def _operations(self) -> Iterator[tuple[int, int, int]]:
        """How often, bytes moved and FLOP of all that runs outside fusions, collectives left out."""
        # Inside a fusion nothing touches memory: its FLOP count with the fusion, its traffic is that of the fusion's
        # operands and results.
        fused = {name for _, _, one in self.walk() if one.opcode == "fusion" for name in called_by(one)}
        within = {
            name: sum(self._flops(self.computations[name], one).total for one in inside.instructions.values())
            for name, inside in self.computations.items()
            if name in fused
        }
        for times, computation, one in self.walk():
            if computation.name in fused or one.opcode in _MOVERS or one.opcode.startswith(_TALKERS):
                continue
            inside = called_by(one) if one.opcode == "fusion" else []
            count = sum(within[name] for name in inside) if inside else self._flops(computation, one).total
            yield times, _moved(self, computation, one), count

    def _flops(self, computation: Computation, one: Instruction) -> Count:
        if one.opcode != "custom-call":
            counts = {"dot": _dot, "ragged-dot": _ragged_dot, "convolution": _convolution}
            return Count(counts[one.opcode](computation, one) if one.opcode in counts else 0, 0)
        operands = (operand(computation, one, index) for index in range(len(one.operands)))
        numbers = [o.arrays[0] for o in operands if o is not None and o.arrays]
        shapes = [array.dims for array in numbers if array.dtype.startswith(("f", "bf"))]
        known = kernels.count(one.name, shapes, one.arrays[-1].dims, self.grouped_rows) if one.arrays else None
        flops = re.search(r'"flops":"?(\d+)', one.attributes)
        return known or Count(int(flops.group(1)) if flops else 0, 0)


def parse(text: str, *, idle: str = "", grouped_rows: int = 0) -> Program:
    """Read the text of a compiled module (`compiled.as_text()`).

    Args:
        idle: the name scope of loops that depend on data and do not turn as a rule.
        grouped_rows: rows of a grouped product that belong to a group, as a rule; 0: all.
    """
    # Callees stand before callers in the text, so a walk from the end has the number of runs of a caller before it
    # reaches what is called. Loops multiply, several callers add.
    computations, entry = read_computations(text)
    runs, unknown = {entry: 1}, []
    for name in reversed(computations):  # a computation stands before those that call it
        for one in computations[name].instructions.values():
            times = runs.get(name, 0)
            if one.opcode == "while":
                trips = _trips(computations, computations[name], one)
                if trips is None:
                    trips = 0 if idle and idle in one.op_name.split("/") else 1
                    unknown += [one.name] * trips
                times *= trips
            for called in called_by(one) if times else ():
                runs[called] = runs.get(called, 0) + times
    return Program(computations, runs, tuple(unknown), grouped_rows)


def _trips(computations: Mapping[str, Computation], around: Computation, loop: Instruction) -> int | None:
    """How often the body of a loop runs: what XLA says, else by `i < bound; i += step`; None: it depends on data."""
    if known := _KNOWN.search(loop.attributes):
        return int(known.group(1))
    condition, body = (computations.get(option(loop, rf"\b{part}=%?([^ ,)]+)", "")) for part in ("condition", "body"))
    if condition is None or body is None:
        return None
    bounds = [one for one in condition.instructions.values() if one.opcode == "constant" and one.arrays[0].dims == ()]
    compared = condition.root
    if compared.opcode == "fusion":
        compared = computations[called_by(compared)[0]].root
    if compared.opcode != "compare" or "direction=LT" not in compared.attributes or len(bounds) != 1:
        return None
    counter = int(option(condition.instructions[condition.root.operands[0]], r"index=(\d+)", "0"))
    start = _constant(around, loop.operands[0], counter)
    step = _step(computations, body, _unwrapped(body, body.root.operands[counter]), counter)
    return None if start is None or not step else max(-(-(int(bounds[0].literal) - start) // step), 0)


def _step(computations: Mapping[str, Computation], body: Computation, one: Instruction, counter: int) -> int | None:
    """What one turn adds to element `counter` of what a loop carries, as far as instruction `one` of its body."""
    if one.opcode == "get-tuple-element" and f"index={counter}" in one.attributes.split(", "):
        return 0
    # The increment of the counter may be an instruction of the body or sit inside a fusion, whose parameters then stand
    # for what the body hands in.
    inside = computations[called_by(one)[0]] if one.opcode == "fusion" else body
    added = inside.root if one.opcode == "fusion" else one
    if added.opcode != "add":
        return None
    terms = [_unwrapped(inside, name) for name in added.operands]
    if one.opcode == "fusion":
        outer = [_unwrapped(body, name) for name in one.operands]
        terms = [outer[int(term.literal)] if term.opcode == "parameter" else term for term in terms]
    for before, more in (terms, terms[::-1]):
        step = _step(computations, body, before, counter)
        if step is not None and more.opcode == "constant":
            return step + int(more.literal)
    return None


def _constant(around: Computation, name: str, index: int) -> int | None:
    """The integer that element `index` of a tuple has, None if it is none."""
    one = around.instructions[name]
    one = _unwrapped(around, one.operands[index] if one.opcode == "tuple" else name)
    return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None


def _unwrapped(computation: Computation, name: str) -> Instruction:
    """An instruction, or what it is a copy of."""
    one = computation.instructions[name]
    wrappers = ("copy", "bitcast", "convert", "copy-done", "copy-start")
    return _unwrapped(computation, one.operands[0]) if one.opcode in wrappers else one


def _dot(computation: Computation, one: Instruction) -> int:
    left = operand(computation, one, 0)
    return 2 * math.prod(_contracted(left, one)) * math.prod(one.arrays[0].dims) if left else 0


def _ragged_dot(computation: Computation, one: Instruction) -> int:
    """Rows times the matrix of their group; or [R, M], [R, N] -> [G, M, N], where each row belongs to one group."""
    left, ragged = operand(computation, one, 0), option(one, r"lhs_ragged_dims=\{(\d*)", "")
    if left is None:
        return 0
    grouped = ragged in option(one, r"lhs_contracting_dims=\{([\d,]*)\}", "").split(",") and ragged
    return 2 * math.prod(_contracted(left, one)) * math.prod(one.arrays[0].dims[1 if grouped else 0 :])


def _contracted(left: Instruction, one: Instruction) -> list[int]:
    axes = option(one, r"lhs_contracting_dims=\{([\d,]*)\}", "").split(",")
    return [left.arrays[0].dims[int(axis)] for axis in axes if axis]


def _convolution(computation: Computation, one: Instruction) -> int:
    """2 x batch x features in x features out x pairs of places that meet, holes of dilation and padding left out."""
    left, right = operand(computation, one, 0), operand(computation, one, 1)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if left is None or right is None or labels is None:
        return 0
    # A convolution by its labels: gradients of convolutions are convolutions with the roles of batch, features and
    # places exchanged, so no position may be assumed.
    of_left, of_right, of_out = ({label: i for i, label in enumerate(part)} for part in labels.groups())
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", option(one, r"window=\{([^}]*)\}", "")))
    groups = int(option(one, r"feature_group_count=(\d+)", "1"))
    batches = int(option(one, r"batch_group_count=(\d+)", "1"))
    pairs = 1
    for axis in (label for label in of_left if label.isdigit()):
        i = int(axis)

        def entry(name: str, default: str, i: int = i) -> str:
            return window[name].split("x")[i] if name in window else default

        low = int(entry("pad", "0_0").split("_")[0])
        pairs *= _meeting(
            left.arrays[0].dims[of_left[axis]],
            right.arrays[0].dims[of_right[axis]],
            one.arrays[0].dims[of_out[axis]],
            low,
            int(entry("stride", "1")),
            int(entry("lhs_dilate", "1")),
            int(entry("rhs_dilate", "1")),
        )
    batch, features = left.arrays[0].dims[of_left["b"]], left.arrays[0].dims[of_left["f"]]
    out = one.arrays[0].dims[of_out["f"]]
    return 2 * (features // groups) * out * (batch // batches) * pairs


@functools.cache
def _meeting(size: int, taps: int, out: int, low: int, stride: int, dilate: int, spread: int) -> int:
    """Pairs of a place of the output and of the kernel that meet an element of the input."""
    # Counted place by place: with padding and dilation there is no product formula, and the sizes are small.
    last = (size - 1) * dilate
    at = (place * stride - low + tap * spread for place in range(out) for tap in range(taps))
    return sum(0 <= where <= last and where % dilate == 0 for where in at)


def _moved(program: Program, computation: Computation, one: Instruction) -> int:
    """Bytes that an instruction reads and writes in the memory of the chip; `S(n)` marks what lies elsewhere."""
    if one.opcode.endswith(("-done", "-update")) or one.opcode == "copy-start":
        return one.bytes // 2 if one.opcode == "copy-start" else 0
    read = written = 0
    # A fusion that only slices an operand reads the slice and not the operand; one that updates a part in place writes
    # that part. Inside of loops over layers this is the difference between one layer and all.
    inner = program.computations[called_by(one)[0]] if one.opcode == "fusion" else None
    for index in range(len(one.operands)):
        read_from = operand(computation, one, index)
        if read_from is not None:
            sliced = _sliced(inner, index) if inner else None
            read += _in_memory(read_from.arrays) if sliced is None else min(sliced, _in_memory(read_from.arrays))
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        read = _in_memory(one.arrays)
    written = _in_memory(one.arrays)
    updating = inner.root if inner else one
    if updating.opcode in ("dynamic-update-slice", "scatter"):
        update = operand(inner or computation, updating, 1 if updating.opcode == "dynamic-update-slice" else 2)
        if update is not None and not inner:
            return 2 * _in_memory(update.arrays)
        written = min(written, _in_memory(update.arrays)) if update is not None else written
    return read + written


def _sliced(inner: Computation, index: int) -> int | None:
    """Bytes that a fusion takes of operand `index` if it only slices it or updates a part of it; None: all."""
    name = next(
        (o.name for o in inner.instructions.values() if o.opcode == "parameter" and o.literal == str(index)), ""
    )
    total, names = 0, {name}
    for one in inner.instructions.values():  # in order, so that a bitcast stands before its users
        used = [i for i, operand in enumerate(one.operands) if operand in names]
        if not used:
            continue
        if one.opcode == "bitcast":
            names.add(one.name)
        elif one.opcode in ("dynamic-slice", "slice", "gather") and used == [0]:
            total += one.bytes
        elif one.opcode != "dynamic-update-slice" or used != [0]:
            return None
    return total


def _in_memory(of: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in of if "S(" not in array.layout)
