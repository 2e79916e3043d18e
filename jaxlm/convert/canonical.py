"""One name for each parameter, whatever the shape of the live tree: `layers.7.mixer.q_proj.kernel`.

The live tree holds one entry `layers_7` a block when the layers are unrolled, and `layers.slot_s` with a leading axis
of repeats when they are scanned. Canonical names are those of the unrolled tree, flattened with dots.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm import config
from jaxlm.convert.files.stream import all_finite
from jaxlm.convert.tensors import Tensors
from jaxlm.errors import UserError
from jaxlm.mesh import Axes
from jaxlm.models.decoder import Decoder, Params, abstract_params

DTYPES = ("float16", "bfloat16", "float32", "float64")


class Leaf(NamedTuple):
    """Shape and logical axes of one parameter of one block."""

    shape: tuple[int, ...]
    axes: Axes


@functools.lru_cache(maxsize=8)
def leaves(cfg: config.Model) -> Mapping[str, Leaf]:
    """Every canonical name of a model, layer by layer; traces one repeat of the pattern whatever the depth."""
    stacked, single = _one_repeat(dataclasses.replace(cfg, n_layers=len(cfg.pattern), layer_loop="scan"))
    layers = {
        f"layers.{r * len(cfg.pattern) + slot}.{name}": leaf
        for r in range(cfg.repeats)
        for (slot, name), leaf in stacked.items()
    }
    return dict(single) | layers


@functools.lru_cache(maxsize=8)
def _one_repeat(cfg: config.Model) -> tuple[Mapping[tuple[int, str], Leaf], Mapping[str, Leaf]]:
    """The leaves of each block of a pattern by its place, and those of no block by name."""
    shapes, axes = abstract_params(Decoder(cfg))
    stacked, single = {}, {}
    for (path, shape), names in zip(
        jax.tree_util.tree_leaves_with_path(shapes),
        jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        inside = re.fullmatch(r"layers\.slot_(\d+)\.(.+)", name)
        if inside:
            stacked[int(inside[1]), inside[2]] = Leaf(shape.shape[1:], names[1:])
        else:
            single[name] = Leaf(shape.shape, names)
    return stacked, single


class Tree(Tensors):
    """The parameters of a live tree by canonical names, on the host, scanned layers unstacked one at a time."""

    def __init__(self, flat: Mapping[tuple[str, ...], Any], cfg: config.Model) -> None:
        self._flat, self._cfg = flat, cfg

    def dtype(self, name: str) -> str:
        """Of a parameter, without copying it to the host."""
        return self._flat[locate(name, self._cfg)[0]].dtype.name

    def source(self, name: str) -> str:
        """The stack that a parameter is part of, if it is."""
        path, index = locate(name, self._cfg)
        return "" if index is None else ".".join(path)

    def __getitem__(self, name: str) -> np.ndarray:
        path, index = locate(name, self._cfg)
        leaf = np.asarray(self._flat[path])
        return leaf if index is None else leaf[index]

    def __iter__(self) -> Iterator[str]:
        return iter(leaves(self._cfg))

    def __len__(self) -> int:
        return len(leaves(self._cfg))


def canonical(params: Params, cfg: config.Model) -> Tree:
    """A live tree by canonical names.

    Raises:
        UserError: the tree is not that of `cfg`.
    """
    flat = {
        tuple(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)  # every key of the tree is a dict key
    }
    places = {name: locate(name, cfg) for name in leaves(cfg)}
    wanted = {path for path, _ in places.values()}
    problems = Problems()
    problems.add("missing", (".".join(path) for path in wanted - flat.keys()))
    problems.add("not expected", (".".join(path) for path in flat.keys() - wanted))
    for name, (path, index) in places.items():
        expected = leaves(cfg)[name].shape if index is None else (cfg.repeats, *leaves(cfg)[name].shape)
        if path in flat and flat[path].shape != expected:
            problems.add("of another shape", [f"{'.'.join(path)} {list(flat[path].shape)} for {list(expected)}"])
    problems.refuse("the parameters are not those of [model]", "use the config that they were trained with")
    return Tree(flat, cfg)


def from_canonical(tensors: Mapping[str, Any], cfg: config.Model, where: str = "tensors") -> Params:
    """The live tree of `cfg`, scanned or unrolled, of numpy arrays in the dtype of the tensors.

    Raises:
        UserError: one line that names `where` and every kind of fault: missing, not expected, of another shape, no
            float, NaN or infinite.
    """
    problems = Problems()
    problems.add("missing", leaves(cfg).keys() - tensors.keys())
    problems.add("not expected", tensors.keys() - leaves(cfg).keys())
    for name, leaf in leaves(cfg).items():
        if name in tensors and (found := fault(np.asarray(tensors[name]), leaf.shape)):
            problems.add(found[0], [f"{name} {found[1]}".rstrip()])
    problems.refuse(where)
    return fill(tensors, cfg)


def fill(
    tensors: Mapping[str, Any],
    cfg: config.Model,
    lay: Callable[[tuple[str, ...], np.ndarray], Any] = lambda path, leaf: leaf,
) -> Params:
    """A live tree of sound tensors by canonical names, each read once.

    Args:
        lay: takes each leaf, with its path, before the next one is read; what it returns is in the tree. Default: the
            arrays themselves.

    Raises:
        UserError: a tensor turns out to be damaged.
    """
    names: dict[tuple[str, ...], list[str]] = {}  # of the tensors of each leaf, in the order of their layers
    for name in leaves(cfg):
        names.setdefault(locate(name, cfg)[0], []).append(name)
    params: Params = {}
    for path, several in names.items():
        place = params
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = lay(path, _leaf(tensors, several, stacked=locate(several[0], cfg)[1] is not None))
    return params


def _leaf(tensors: Mapping[str, Any], names: Sequence[str], stacked: bool) -> np.ndarray:
    """A tensor, or those of all layers as one stack: where they differ in dtype, in one that holds all exactly."""
    if not stacked:
        return np.require(np.asarray(tensors[names[0]]), requirements=["C", "W"])  # nothing that a file is mapped to
    first = np.asarray(tensors[names[0]])
    stack = np.empty((len(names), *first.shape), first.dtype)
    for index, name in enumerate(names):
        tensor = first if index == 0 else np.asarray(tensors[name])
        # Only the layers that are there are widened: the rest is memory as it was, whose NaNs a cast would warn of.
        if (dtype := _wider(stack.dtype, tensor.dtype)) != stack.dtype:
            there, stack = stack[:index], np.empty(stack.shape, dtype)
            stack[:index] = there
        stack[index] = tensor
    return stack


DEQUANTISE = "dequantise them first: from_pretrained(..., dtype='bfloat16'), dequantize(), save_pretrained(...)"
CONFIG = "does the config belong to these weights?"
HINTS = {
    "no float": DEQUANTISE,
    "missing": CONFIG,
    "not expected": CONFIG,
    "of another shape": CONFIG,
    "NaN or infinite": "the training went wrong before they were saved: take an earlier checkpoint",
}
"""What to do about a kind of fault, the gravest first."""


class Problems:
    """Faults by kind; all of them become one line."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, names: Iterable[str]) -> None:
        """Note tensors that have one kind of fault."""
        self._found.setdefault(kind, []).extend(names)

    def refuse(self, where: str, hint: str = "") -> None:
        """Raise the `UserError` that counts each kind and names the first few, or do nothing.

        Args:
            hint: what to do; empty: what `HINTS` says of the gravest kind.
        """
        lines = [
            f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind}: {_first(names)}"
            for kind, names in self._found.items()
            if names
        ]
        if lines:
            kinds = [kind for kind, names in self._found.items() if names]
            hint = hint or next((HINTS[kind] for kind in HINTS if kind in kinds), "write them anew in one dtype")
            raise UserError(f"{where}: {'; '.join(lines)}", hint)


def locate(name: str, cfg: config.Model) -> tuple[tuple[str, ...], int | None]:
    """Path of a canonical name in the live tree, and its index along the repeats when the layers are scanned."""
    first, *rest = name.split(".")
    if first != "layers":
        return (first, *rest), None
    number, *inside = rest
    if not cfg.scanned:
        return (f"layers_{number}", *inside), None
    repeat, slot = divmod(int(number), len(cfg.pattern))
    return ("layers", f"slot_{slot}", *inside), repeat


def _wider(one: np.dtype, other: np.dtype) -> np.dtype:
    """The dtype that holds both: float16 and bfloat16 together need float32."""
    if one.itemsize != other.itemsize:
        return max(one, other, key=lambda dtype: dtype.itemsize)
    return one if one == other else np.dtype(np.float32)


def fault(tensor: np.ndarray, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """The kind of fault of a tensor and what of it, if it has one."""
    if tensor.dtype.name not in DTYPES:
        return "no float", tensor.dtype.name
    if tensor.shape != shape:
        return "of another shape", f"{list(tensor.shape)} for {list(shape)}"
    return None if all_finite(tensor) else ("NaN or infinite", "")


def _first(names: list[str], count: int = 3) -> str:
    shown = sorted(names, key=_natural)[:count]
    return ", ".join(shown) + (", ..." if len(names) > count else "")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
