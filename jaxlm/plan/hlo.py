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

from jaxlm.plan import kernels
from jaxlm.plan.kernels import Count

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the others, the first number of their name
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<= ]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^ ]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([^ ]+) = ")
_OPERAND = re.compile(r"%([^ ,)]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([^ ,)]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
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


class Array(NamedTuple):
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> int:
        bits = ITEM_BITS[self.dtype] if self.dtype in ITEM_BITS else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    """Its result; several for a tuple."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """The rest of the line."""
    literal: str
    """What stands in the parentheses of a constant or a parameter."""
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from."""
        return _option(self, r'op_name="([^"]*)"', "")


class Computation(NamedTuple):
    """A named list of instructions."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.root)


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
        fused = {name for _, _, one in self.walk() if one.opcode == "fusion" for name in _called(one)}
        within = {
            name: sum(self._flops(self.computations[name], one).total for one in inside.instructions.values())
            for name, inside in self.computations.items()
            if name in fused
        }
        for times, computation, one in self.walk():
            if computation.name in fused or one.opcode in _MOVERS or one.opcode.startswith(_TALKERS):
                continue
            inside = _called(one) if one.opcode == "fusion" else []
            count = sum(within[name] for name in inside) if inside else self._flops(computation, one).total
            yield times, _moved(self, computation, one), count

    def _flops(self, computation: Computation, one: Instruction) -> Count:
        if one.opcode != "custom-call":
            counts = {"dot": _dot, "ragged-dot": _ragged_dot, "convolution": _convolution}
            return Count(counts[one.opcode](computation, one) if one.opcode in counts else 0, 0)
        operands = (_operand(computation, one, index) for index in range(len(one.operands)))
        numbers = [o.arrays[0] for o in operands if o is not None and o.arrays]
        shapes = [array.dims for array in numbers if array.dtype.startswith(("f", "bf"))]
        known = kernels.count(one.name, shapes, one.arrays[-1].dims, self.grouped_rows) if one.arrays else None
        told = re.search(r'"flops":"?(\d+)', one.attributes)
        return known or Count(int(told.group(1)) if told else 0, 0)


def parse(text: str, *, idle: str = "", grouped_rows: int = 0) -> Program:
    """Read the text of a compiled module (`compiled.as_text()`).

    Args:
        idle: the name scope of loops that depend on data and do not turn as a rule.
        grouped_rows: rows of a grouped product that belong to a group, as a rule; 0: all.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in _joined(text):
        if (head := _INSTRUCTION.match(line)) is not None:
            current[head.group(1)] = _instruction(head.group(1), line[head.end() :], "ROOT " in line[: head.end()])
        elif (found := _COMPUTATION.match(line)) is not None:
            current = {}
            computations[found.group(2)] = Computation(found.group(2), current)
            entry = found.group(2) if found.group(1) else entry
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
            for called in _called(one) if times else ():
                runs[called] = runs.get(called, 0) + times
    return Program(computations, runs, tuple(unknown), grouped_rows)


def _joined(text: str) -> Iterator[str]:
    """Its lines, those put together that an attribute of an instruction breaks."""
    held = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(line) or _COMPUTATION.match(line) or line in ("", "}"):
            if held:
                yield held
            held = line
        else:
            held += line
    yield held


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0)
    inside, attributes = rest[: end - 1], rest[end:]
    return Instruction(name, arrays(shape), opcode, tuple(_OPERAND.findall(inside)), attributes, inside, root)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape as it is written, `(f32[8]{0}, s32[])`."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        sizes = tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip())
        found.append(Array(dtype, sizes, layout))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at
    return len(text)


def _called(one: Instruction) -> list[str]:
    """Computations that an instruction runs; the functions of reductions, sorts and collectives are not counted."""
    if one.opcode in ("fusion", "call", "async-start", "conditional"):
        branches = _BRANCHES.search(one.attributes)
        return _CALLED.findall(one.attributes) + (re.findall(r"[^%, ]+", branches.group(1)) if branches else [])
    if one.opcode == "while":
        return re.findall(r"\bbody=%?([^ ,)]+)", one.attributes)
    return []


def _trips(computations: Mapping[str, Computation], around: Computation, loop: Instruction) -> int | None:
    """How often the body of a loop runs: what XLA says, else by `i < bound; i += step`; None: it depends on data."""
    if known := _KNOWN.search(loop.attributes):
        return int(known.group(1))
    condition, body = (computations.get(_option(loop, rf"\b{part}=%?([^ ,)]+)", "")) for part in ("condition", "body"))
    if condition is None or body is None:
        return None
    bounds = [one for one in condition.instructions.values() if one.opcode == "constant" and one.arrays[0].dims == ()]
    compared = condition.root
    if compared.opcode == "fusion":
        compared = computations[_called(compared)[0]].root
    if compared.opcode != "compare" or "direction=LT" not in compared.attributes or len(bounds) != 1:
        return None
    counter = int(_option(condition.instructions[condition.root.operands[0]], r"index=(\d+)", "0"))
    start = _constant(around, loop.operands[0], counter)
    step = _step(computations, body, _unwrapped(body, body.root.operands[counter]), counter)
    return None if start is None or not step else max(-(-(int(bounds[0].literal) - start) // step), 0)


def _step(computations: Mapping[str, Computation], body: Computation, one: Instruction, counter: int) -> int | None:
    """What one turn adds to element `counter` of what a loop carries, as far as instruction `one` of its body."""
    if one.opcode == "get-tuple-element" and f"index={counter}" in one.attributes.split(", "):
        return 0
    inside = computations[_called(one)[0]] if one.opcode == "fusion" else body
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


def _operand(computation: Computation, one: Instruction, index: int) -> Instruction | None:
    return computation.instructions.get(one.operands[index]) if index < len(one.operands) else None


def _dot(computation: Computation, one: Instruction) -> int:
    left = _operand(computation, one, 0)
    return 2 * math.prod(_contracted(left, one)) * math.prod(one.arrays[0].dims) if left else 0


def _ragged_dot(computation: Computation, one: Instruction) -> int:
    """Rows times the matrix of their group; or [R, M], [R, N] -> [G, M, N], where each row belongs to one group."""
    left, ragged = _operand(computation, one, 0), _option(one, r"lhs_ragged_dims=\{(\d*)", "")
    if left is None:
        return 0
    grouped = ragged in _option(one, r"lhs_contracting_dims=\{([\d,]*)\}", "").split(",") and ragged
    return 2 * math.prod(_contracted(left, one)) * math.prod(one.arrays[0].dims[1 if grouped else 0 :])


def _contracted(left: Instruction, one: Instruction) -> list[int]:
    axes = _option(one, r"lhs_contracting_dims=\{([\d,]*)\}", "").split(",")
    return [left.arrays[0].dims[int(axis)] for axis in axes if axis]


def _convolution(computation: Computation, one: Instruction) -> int:
    """2 x batch x features in x features out x pairs of places that meet, holes of dilation and padding left out."""
    left, right = _operand(computation, one, 0), _operand(computation, one, 1)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if left is None or right is None or labels is None:
        return 0
    of_left, of_right, of_out = ({label: i for i, label in enumerate(part)} for part in labels.groups())
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _option(one, r"window=\{([^}]*)\}", "")))
    groups = int(_option(one, r"feature_group_count=(\d+)", "1"))
    batches = int(_option(one, r"batch_group_count=(\d+)", "1"))
    pairs = 1
    for axis in (label for label in of_left if label.isdigit()):
        i = int(axis)

        def option(name: str, default: str, i: int = i) -> str:
            return window[name].split("x")[i] if name in window else default

        low = int(option("pad", "0_0").split("_")[0])
        pairs *= _meeting(
            left.arrays[0].dims[of_left[axis]],
            right.arrays[0].dims[of_right[axis]],
            one.arrays[0].dims[of_out[axis]],
            low,
            int(option("stride", "1")),
            int(option("lhs_dilate", "1")),
            int(option("rhs_dilate", "1")),
        )
    batch, features = left.arrays[0].dims[of_left["b"]], left.arrays[0].dims[of_left["f"]]
    out = one.arrays[0].dims[of_out["f"]]
    return 2 * (features // groups) * out * (batch // batches) * pairs


def _option(one: Instruction, pattern: str, default: str) -> str:
    found = re.search(pattern, one.attributes)
    return found.group(1) if found else default


@functools.cache
def _meeting(size: int, taps: int, out: int, low: int, stride: int, dilate: int, spread: int) -> int:
    """Pairs of a place of the output and of the kernel that meet an element of the input."""
    last = (size - 1) * dilate
    at = (place * stride - low + tap * spread for place in range(out) for tap in range(taps))
    return sum(0 <= where <= last and where % dilate == 0 for where in at)


def _moved(program: Program, computation: Computation, one: Instruction) -> int:
    """Bytes that an instruction reads and writes in the memory of the chip; `S(n)` marks what lies elsewhere."""
    if one.opcode.endswith(("-done", "-update")) or one.opcode == "copy-start":
        return one.bytes // 2 if one.opcode == "copy-start" else 0
    read = written = 0
    inner = program.computations[_called(one)[0]] if one.opcode == "fusion" else None
    for index in range(len(one.operands)):
        operand = _operand(computation, one, index)
        if operand is not None:
            sliced = _sliced(inner, index) if inner else None
            read += _in_memory(operand.arrays) if sliced is None else min(sliced, _in_memory(operand.arrays))
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        read = _in_memory(one.arrays)
    written = _in_memory(one.arrays)
    updating = inner.root if inner else one
    if updating.opcode in ("dynamic-update-slice", "scatter"):
        update = _operand(inner or computation, updating, 1 if updating.opcode == "dynamic-update-slice" else 2)
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
