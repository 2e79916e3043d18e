"""A weight layout is a list of rows: our name, their name, and transforms that know their own inverse.

    Row("layers.{i}.mixer.q_proj.kernel", "model.layers.{i}.self_attn.q_proj.weight", matrix)

`to_layout` reads the rows from left to right, `from_layout` the same rows from right to left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.convert.canonical import Leaf, build, canonical, leaves
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params


class Transform(NamedTuple):
    """A bijection of arrays. `leaf` describes the parameter on our side."""

    out: Callable[[np.ndarray, Leaf], np.ndarray]
    back: Callable[[np.ndarray, Leaf], np.ndarray]


def inputs(leaf: Leaf) -> int:
    """How many leading axes of a kernel [in..., out...] are its input.

    The residual stream `embed` stands alone on one side of every kernel that has it: the input if it comes first, else
    the output. Kernels without it have one input axis.
    """
    return max(1, leaf.axes.index("embed")) if "embed" in leaf.axes else 1


def _single(leaf: Leaf) -> Leaf:
    """One of a stack of experts."""
    return Leaf(leaf.shape[1:], leaf.axes[1:]) if leaf.axes[0] == "experts" else leaf


def _stacked(leaf: Leaf) -> tuple[int, ...]:
    return leaf.shape[:1] if leaf.axes[0] == "experts" else ()


matrix = Transform(
    lambda x, leaf: x.reshape(*_stacked(leaf), math.prod(_single(leaf).shape[: inputs(_single(leaf))]), -1).swapaxes(
        -1, -2
    ),
    lambda x, leaf: x.swapaxes(-1, -2).reshape(leaf.shape),
)
"""Kernel [in..., out...] to weight [out, in], all inputs and all outputs flattened; of a stack of experts each one."""

flat = Transform(lambda x, leaf: x.reshape(*_stacked(leaf), -1), lambda x, leaf: x.reshape(leaf.shape))
"""Bias [out...] to [out]; of a stack of experts each one."""

pairs_to_halves = Transform(
    lambda x, leaf: x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape),
    lambda x, leaf: x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape),
)
"""Last axis, a head: from rotary pairs (2i, 2i + 1) to (i, i + H/2)."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter in two layouts; `{i}` stands for the number of a layer."""

    ours: str
    theirs: str
    transforms: tuple[Transform, ...]

    def __init__(self, ours: str, theirs: str, *transforms: Transform) -> None:
        object.__setattr__(self, "ours", ours)
        object.__setattr__(self, "theirs", theirs)
        object.__setattr__(self, "transforms", transforms)

    def out(self, x: np.ndarray, leaf: Leaf) -> np.ndarray:
        """Our array as theirs."""
        for transform in self.transforms:
            x = transform.out(x, leaf)
        return x

    def back(self, x: np.ndarray, leaf: Leaf) -> np.ndarray:
        """Their array as ours."""
        for transform in reversed(self.transforms):
            x = transform.back(x, leaf)
        return x

    def shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Shape of their array; an array of zero strides finds it without memory."""
        return self.out(np.broadcast_to(np.float32(0), leaf.shape), leaf).shape

    def of_layer(self, i: int) -> Row:
        """The row of one layer."""
        return Row(self.ours.replace("{i}", str(i)), self.theirs.replace("{i}", str(i)), *self.transforms)


def to_layout(params: Params, cfg: config.Model, rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of a live tree in the layout of `rows`, one at a time; views where nothing needs to be copied.

    Raises:
        UserError: the layout has no row for a parameter, or the tree is not that of `cfg`.
    """
    by_name = {row.ours: row for row in expand(rows, cfg)}
    for name, tensor in canonical(params, cfg):
        row = by_name[name]
        yield row.theirs, row.out(tensor, leaves(cfg)[name])


def from_layout(
    tensors: Mapping[str, np.ndarray], cfg: config.Model, rows: Sequence[Row], where: str = "tensors"
) -> Params:
    """The live tree of `cfg` from tensors in the layout of `rows`, each read once.

    Raises:
        UserError: one line with every missing, unexpected, mis-shaped, non-float or non-finite tensor, by their names.
    """
    by_name = {row.theirs: row for row in expand(rows, cfg)}
    shapes = {name: row.shape(leaves(cfg)[row.ours]) for name, row in by_name.items()}

    def place(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
        row = by_name[name]
        return row.ours, row.back(tensor, leaves(cfg)[row.ours])

    return build(tensors, shapes, place, cfg, where)


def expand(rows: Sequence[Row], cfg: config.Model) -> list[Row]:
    """The rows of every layer, for exactly the parameters that the model has.

    Raises:
        UserError: a parameter has no row.
        ValueError: two rows share a name, a mistake in the table.
    """
    every = [
        one for row in rows for one in ([row.of_layer(i) for i in range(cfg.n_layers)] if "{i}" in row.ours else [row])
    ]
    used = [row for row in every if row.ours in leaves(cfg)]
    for side in ("ours", "theirs"):
        names = [getattr(row, side) for row in used]
        if len(names) != len(set(names)):
            raise ValueError(f"two rows share a name: {sorted(name for name in names if names.count(name) > 1)}")
    if homeless := sorted(leaves(cfg).keys() - {row.ours for row in used}):
        raise UserError(f"the layout has no place for {len(homeless)} parameters, such as {homeless[0]}")
    return used
