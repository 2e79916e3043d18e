"""A weight layout is a list of rows: our names, their names, and transforms that know their own inverse.

    Row("layers.{i}.mixer.q_proj.kernel", "model.layers.{i}.self_attn.q_proj.weight", matrix)
    Row(("{i}.q.kernel", "{i}.k.kernel", "{i}.v.kernel"), "{i}.qkv.weight", matrix, join(0))     # several are one
    Row("layers.{i}.ffn.experts.up_proj.kernel", "layers.{i}.experts.{e}.w3.weight", matrix, each)   # one is several

A layout is a bijection of parameters: `plan` reads the rows from left to right, `Parameters` the same rows from right
to left. Both hand out one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.convert.canonical import DTYPES, Leaf, Problems, canonical, fault, fill, leaves
from jaxlm.convert.files.stream import Planned, release
from jaxlm.convert.tensors import Tensors, tensors_of
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params

Arrays = Sequence[np.ndarray]


class Transform(NamedTuple):
    """A bijection of lists of arrays. `leaves` describes the parameters on our side, `like` what went into `out`."""

    out: Callable[[Arrays, Sequence[Leaf]], Arrays]
    back: Callable[[Arrays, Sequence[Leaf], Arrays], Arrays]


def of_each(out: Callable[[np.ndarray, Leaf], np.ndarray], back: Callable[[np.ndarray, Leaf], np.ndarray]) -> Transform:
    """A bijection of single arrays, for each of the list."""

    def all_out(xs: Arrays, leaves: Sequence[Leaf]) -> Arrays:
        return [out(x, leaf) for x, leaf in zip(xs, leaves, strict=True)]

    def all_back(xs: Arrays, leaves: Sequence[Leaf], _: Arrays) -> Arrays:
        return [back(x, leaf) for x, leaf in zip(xs, leaves, strict=True)]

    return Transform(all_out, all_back)


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


def _two_axes(x: np.ndarray, leaf: Leaf) -> np.ndarray:
    one = _single(leaf)
    return x.reshape(*_stacked(leaf), math.prod(one.shape[: inputs(one)]), -1)


plain = of_each(_two_axes, lambda x, leaf: x.reshape(leaf.shape))
"""Kernel [in..., out...] to [in, out], all inputs and all outputs flattened; of a stack of experts each one."""

matrix = of_each(
    lambda x, leaf: _two_axes(x, leaf).swapaxes(-1, -2), lambda x, leaf: x.swapaxes(-1, -2).reshape(leaf.shape)
)
"""The same as weight [out, in]."""

flat = of_each(lambda x, leaf: x.reshape(*_stacked(leaf), -1), lambda x, leaf: x.reshape(leaf.shape))
"""Bias [out...] to [out]; of a stack of experts each one."""

pairs_to_halves = of_each(
    lambda x, leaf: x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape),
    lambda x, leaf: x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape),
)
"""Last axis, a head: from rotary pairs (2i, 2i + 1) to (i, i + H/2)."""


def join(axis: int) -> Transform:
    """Several arrays one after the other along an axis of the file."""

    def out(xs: Arrays, _: Sequence[Leaf]) -> Arrays:
        return [np.concatenate(xs, axis)]

    def back(xs: Arrays, _: Sequence[Leaf], like: Arrays) -> Arrays:
        return np.split(xs[0], np.cumsum([x.shape[axis] for x in like])[:-1], axis)

    return Transform(out, back)


def _by_turns(xs: Arrays, _: Sequence[Leaf]) -> Arrays:
    return [np.stack(xs, -1).reshape(*xs[0].shape[:-1], -1)]


def _from_turns(xs: Arrays, _: Sequence[Leaf], like: Arrays) -> Arrays:
    return [xs[0][..., n :: len(like)] for n in range(len(like))]


def _unstacked(xs: Arrays, _: Sequence[Leaf]) -> Arrays:
    return list(xs[0])


def _restacked(xs: Arrays, _: Sequence[Leaf], __: Arrays) -> Arrays:
    return [np.stack(xs)]


interleave = Transform(_by_turns, _from_turns)
"""Several arrays of one shape by turns along the last axis of the file: a0 b0 a1 b1 ..."""

each = Transform(_unstacked, _restacked)
"""One array as a list along its first axis: a tensor for each expert."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Parameters in two layouts; `{i}` stands for the number of a layer, `{e}` in their name for that of an expert."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transforms: tuple[Transform, ...]

    def __init__(self, ours: str | tuple[str, ...], theirs: str | tuple[str, ...], *transforms: Transform) -> None:
        object.__setattr__(self, "ours", (ours,) if isinstance(ours, str) else ours)
        object.__setattr__(self, "theirs", (theirs,) if isinstance(theirs, str) else theirs)
        object.__setattr__(self, "transforms", transforms)

    def out(self, xs: Arrays, leaves: Sequence[Leaf]) -> Arrays:
        """Our arrays as theirs."""
        for transform in self.transforms:
            xs = transform.out(xs, leaves)
        return xs

    def back(self, xs: Arrays, leaves: Sequence[Leaf]) -> Arrays:
        """Their arrays as ours."""
        stages = [hollow(leaves)]
        for transform in self.transforms[:-1]:
            stages.append(transform.out(stages[-1], leaves))
        for transform, like in zip(reversed(self.transforms), reversed(stages), strict=bool(self.transforms)):
            xs = transform.back(xs, leaves, like)
        return xs

    def shapes(self, leaves: Sequence[Leaf]) -> list[tuple[int, ...]]:
        """Shapes of their arrays."""
        return [x.shape for x in self.out(hollow(leaves), leaves)]

    def of(self, **numbers: str) -> Row:
        """The row of one layer."""

        def filled(name: str) -> str:
            for key, number in numbers.items():
                name = name.replace(f"{{{key}}}", number)
            return name

        return Row(tuple(map(filled, self.ours)), tuple(map(filled, self.theirs)), *self.transforms)

    def of_experts(self, count: int) -> Row:
        """The row with a name for each expert."""
        names = [name.replace("{e}", str(e)) for name in self.theirs for e in range(count)]
        return Row(self.ours, tuple(names), *self.transforms)


def hollow(leaves: Sequence[Leaf]) -> Arrays:
    """Arrays of these shapes that take no memory, to see what becomes of a shape."""
    return [np.broadcast_to(np.float32(0), leaf.shape) for leaf in leaves]


def plan(parameters: Mapping[str, Any], cfg: config.Model, rows: Sequence[Row]) -> Iterator[Planned]:
    """Every tensor of a layout; `parameters` by canonical names.

    Raises:
        UserError: the layout has no row for a parameter.
    """
    tensors, known = tensors_of(parameters), leaves(cfg)
    for row in expand(rows, cfg):
        mine = [known[name] for name in row.ours]
        for number, (name, shape) in enumerate(zip(row.theirs, row.shapes(mine), strict=True)):
            make, first = functools.partial(_make, tensors.unchecked, row, mine, number), row.ours[0]
            settle, source = functools.partial(tensors.settle, row.ours), tensors.source(first)
            yield Planned(name, shape, tensors.dtype(first), make, tensors.origin(first), settle, source)


def _make(read: Callable[[str], np.ndarray], row: Row, mine: Sequence[Leaf], number: int) -> np.ndarray:
    return row.out([read(name) for name in row.ours], mine)[number]


class Parameters(Tensors):
    """The parameters of a model by canonical names, out of tensors in the layout of `rows`, each read when asked for.

    Raises:
        UserError: one line with every missing, unexpected or mis-shaped tensor by the names of the layout; on access, a
            tensor that is no float, not finite, or in another dtype than those it is joined with.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], cfg: config.Model, rows: Sequence[Row], where: str = "tensors"
    ) -> None:
        self._tensors, self._leaves, self._where = tensors_of(tensors), leaves(cfg), where
        self._rows = {name: row for row in expand(rows, cfg) for name in row.ours}
        shapes: dict[str, tuple[int, ...]] = {}
        for row in self._rows.values():
            shapes |= zip(row.theirs, row.shapes([self._leaves[name] for name in row.ours]), strict=True)
        problems = Problems()
        problems.add("missing", shapes.keys() - tensors.keys())
        problems.add("not expected", tensors.keys() - shapes.keys())
        found = {name: self._tensors.shape(name) for name in shapes if name in tensors}
        wrong = [name for name in found if found[name] != shapes[name]]
        problems.add("of another shape", (f"{name} {list(found[name])} for {list(shapes[name])}" for name in wrong))
        problems.add("no float", (f"{name} {self._type(name)}" for name in found if self._type(name) not in DTYPES))
        problems.refuse(where)

    def _type(self, theirs: str) -> str:
        return self._tensors.dtype(theirs)

    def stored(self, name: str) -> str:
        """The tensor that holds a parameter, the first if they are several."""
        return self._rows[name].theirs[0]

    def dtype(self, name: str) -> str:
        """Of a parameter, without reading it."""
        return self._type(self.stored(name))

    def origin(self, name: str) -> str:
        """Where a parameter is stored, for messages."""
        theirs = self._rows[name].theirs
        return f"{self._where}: {theirs[0]}{', ...' if len(theirs) > 1 else ''}"

    def unchecked(self, name: str) -> np.ndarray:
        """A parameter that may be NaN or infinite and is yet to be settled; a view of the file where it can be one."""
        return self._read(name, self._tensors.unchecked, lambda x: None)

    def settle(self, names: Sequence[str], array: np.ndarray, digest: str = "") -> None:
        """Compare the tensors of parameters with their manifest; see `Tensors`."""
        for name in names:
            self._tensors.settle(self._rows[name].theirs, array, digest)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name, self._tensors.__getitem__, lambda x: fault(x, x.shape))

    def _read(
        self,
        name: str,
        read: Callable[[str], np.ndarray],
        judge: Callable[[np.ndarray], tuple[str, str] | None],
    ) -> np.ndarray:
        row = self._rows[name]
        xs = [read(theirs) for theirs in row.theirs]
        problems = Problems()
        for theirs, x in zip(row.theirs, xs, strict=True):
            if found := judge(x):
                problems.add(found[0], [f"{theirs} {found[1]}".rstrip()])
            elif x.dtype != xs[0].dtype:
                problems.add(f"in another dtype than {row.theirs[0]}", [f"{theirs} {x.dtype}"])
        problems.refuse(self._where)
        made = row.back(xs, [self._leaves[mine] for mine in row.ours])[row.ours.index(name)]
        release(*xs)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def to_layout(params: Params, cfg: config.Model, rows: Sequence[Row]) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of a live tree in the layout of `rows`, one at a time; views where nothing needs to be copied.

    Raises:
        UserError: the layout has no row for a parameter, or the tree is not that of `cfg`.
    """
    for one in plan(canonical(params, cfg), cfg, rows):
        yield one.name, one.make()


def from_layout(
    tensors: Mapping[str, np.ndarray], cfg: config.Model, rows: Sequence[Row], where: str = "tensors"
) -> Params:
    """The live tree of `cfg` from tensors in the layout of `rows`.

    Raises:
        UserError: see `Parameters`; or a stack of layers in two dtypes.
    """
    return fill(Parameters(tensors, cfg, rows, where), cfg)


def expand(rows: Sequence[Row], cfg: config.Model) -> list[Row]:
    """The rows of every layer, for exactly the parameters that the model has.

    Raises:
        UserError: a parameter has no row.
        ValueError: two rows share a name, or a row only has some of its parameters: a mistake in the table.
    """
    known = leaves(cfg)
    used: list[Row] = []
    for row in rows:
        layers = range(cfg.n_layers) if any("{i}" in name for name in row.ours) else [0]
        for one in (row.of(i=str(i)) for i in layers):
            have = [name in known for name in one.ours]
            if any(have) and not all(have):
                raise ValueError(f"a row joins {one.ours}, of which the model has only some")
            if any(have):
                several = any("{e}" in name for name in one.theirs)
                used.append(one.of_experts(known[one.ours[0]].shape[0]) if several else one)
    for side in ("ours", "theirs"):
        names: list[str] = [name for row in used for name in getattr(row, side)]
        if len(names) != len(set(names)):
            raise ValueError(f"two rows share a name: {sorted(name for name in names if names.count(name) > 1)}")
    if homeless := sorted(known.keys() - {name for row in used for name in row.ours}):
        raise UserError(f"the layout has no place for {len(homeless)} parameters, such as {homeless[0]}")
    return used
