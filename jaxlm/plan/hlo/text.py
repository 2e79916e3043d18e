"""The text of a compiled module, read into computations, instructions and shapes (`xla/hlo/ir/hlo_instruction.cc`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the others, the first number of their name
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<= ]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([^ ]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([^ ]+) = ")
_OPERAND = re.compile(r"%([^ ,)]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([^ ,)]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


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
        return option(self, r'op_name="([^"]*)"', "")


class Computation(NamedTuple):
    """A named list of instructions."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.root)


def read_computations(text: str) -> tuple[dict[str, Computation], str]:
    """Read every computation of a module, by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in _joined(text):
        if (head := _INSTRUCTION.match(line)) is not None:
            current[head.group(1)] = _instruction(head.group(1), line[head.end() :], "ROOT " in line[: head.end()])
        elif (found := _COMPUTATION.match(line)) is not None:
            current = {}
            computations[found.group(2)] = Computation(found.group(2), current)
            entry = found.group(2) if found.group(1) else entry
    return computations, entry


def _joined(text: str) -> Iterator[str]:
    """Its lines, those put together that an attribute of an instruction breaks."""
    # Long attributes (a layout of groups, a literal) are broken over lines; whatever does not begin an instruction or a
    # computation belongs to the line before.
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
    # The shape of a tuple is in parentheses and may nest, so it is closed by counting and not by a pattern.
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


def called_by(one: Instruction) -> list[str]:
    """Computations that an instruction runs; the functions of reductions, sorts and collectives are not counted."""
    if one.opcode in ("fusion", "call", "async-start", "conditional"):
        branches = _BRANCHES.search(one.attributes)
        return _CALLED.findall(one.attributes) + (re.findall(r"[^%, ]+", branches.group(1)) if branches else [])
    if one.opcode == "while":
        return re.findall(r"\bbody=%?([^ ,)]+)", one.attributes)
    return []


def operand(computation: Computation, one: Instruction, index: int) -> Instruction | None:
    return computation.instructions.get(one.operands[index]) if index < len(one.operands) else None


def option(one: Instruction, pattern: str, default: str) -> str:
    found = re.search(pattern, one.attributes)
    return found.group(1) if found else default
