"""A tree of parameters with shapes and counts, as text and as HTML: how a model shows itself.

Layers of equal shape are one entry, `layers_0 to layers_11, each`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any


@dataclasses.dataclass(frozen=True)
class Branch:
    """A parameter, or a module with branches of its own."""

    name: str
    count: int
    """Parameters in all of it."""
    shape: str = ""
    """Dtype and sizes of a parameter; empty for a module."""
    branches: tuple[Branch, ...] = ()
    repeats: int = 1


def branches(params: Mapping[str, Any]) -> tuple[Branch, ...]:
    """The entries of a nested dict of arrays, layers in the order of their numbers and equal ones together."""
    found: list[Branch] = []
    for name in sorted(params, key=_by_number):
        branch = _branch(name, params[name])
        if found and _is_layer(name) and _is_layer(found[-1].name) and _alike(found[-1], branch):
            last = found.pop()
            first = last.name.split(" ")[0]
            branch = dataclasses.replace(
                last, name=f"{first} to {name}, each", count=last.count + branch.count, repeats=last.repeats + 1
            )
        found.append(branch)
    return tuple(found)


def as_text(tree: tuple[Branch, ...]) -> str:
    """An indented line for each entry: name, dtype and shape, parameters."""
    rows = [("  " * depth + branch.name, branch.shape, f"{_each(branch):,}") for branch, depth in _walk(tree)]
    names, shapes, counts = (max((len(row[i]) for row in rows), default=0) for i in range(3))
    return "\n".join(f"{name:<{names}}  {shape:<{shapes}}  {count:>{counts}}" for name, shape, count in rows)


def as_html(tree: tuple[Branch, ...]) -> str:
    """Nested lists that open and close."""
    return "".join(
        f"<details style='margin-left:1em'><summary>{_label(branch)}</summary>{as_html(branch.branches)}</details>"
        if branch.branches
        else f"<div style='margin-left:2em'>{_label(branch)}</div>"
        for branch in tree
    )


def _branch(name: str, value: Any) -> Branch:
    if isinstance(value, Mapping):
        inner = branches(value)
        return Branch(name, sum(branch.count for branch in inner), branches=inner)
    return Branch(name, value.size, f"{value.dtype.name}[{', '.join(map(str, value.shape))}]")


def _walk(tree: tuple[Branch, ...], depth: int = 0) -> Iterator[tuple[Branch, int]]:
    for branch in tree:
        yield branch, depth
        yield from _walk(branch.branches, depth + 1)


def _label(branch: Branch) -> str:
    shape = f" <code>{escape(branch.shape)}</code>" if branch.shape else ""
    return f"<b>{escape(branch.name)}</b>{shape} {_each(branch):,}"


def _each(branch: Branch) -> int:
    return branch.count // branch.repeats


def _alike(one: Branch, other: Branch) -> bool:
    return _each(one) == _each(other) and one.branches == other.branches


def _is_layer(name: str) -> bool:
    return re.match(r"layers_\d+", name) is not None


def _by_number(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"(.*?)(\d+)", name)
    return (found[1], int(found[2])) if found else (name, -1)
