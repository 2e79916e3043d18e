"""Who owns what: every parameter and every leaf of the optimiser, where it lies on the mesh, what a device holds of it.

    describe(cfg, devices=512)      # a table for rich, `as_dict()` for JSON

From shapes and rules alone: nothing is allocated, and no device need be there. Layers are shown stacked, as a scan has
them, so that depth adds neither rows nor time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import optax

from jaxlm import config
from jaxlm.mesh import Axes, Layout
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy, precision
from jaxlm.train.optim import make_optimizer


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of the training state. Sizes are in bytes."""

    name: str
    kind: Literal["parameter", "optimizer"]
    of: str
    """The parameter that it belongs to; empty for counters."""
    shape: tuple[int, ...]
    dtype: str
    axes: Axes
    """Logical axes, one a dimension."""
    mesh_axes: tuple[tuple[str, ...], ...]
    """Mesh axes that split each dimension, those of one device left out."""
    local_shape: tuple[int, ...]
    """What one device holds."""
    local_bytes: int
    copies: int
    """Devices that hold the same part."""

    @property
    def split(self) -> str:
        """The dimensions that are split, `vocab/tensor embed/fsdp`; `whole` if none is."""
        over = zip(self.axes, self.mesh_axes, strict=True)
        return " ".join(f"{axis}/{'+'.join(along)}" for axis, along in over if along) or "whole"


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The layout of a training state."""

    mesh: dict[str, int]
    """Devices along each axis, over all slices."""
    dcn: dict[str, int]
    """The part of each axis that crosses slices, where there are several."""
    leaves: tuple[Leaf, ...]

    def bytes(self, kind: str) -> int:
        """What one device holds of all leaves of a kind."""
        return sum(leaf.local_bytes for leaf in self.leaves if leaf.kind == kind)

    @property
    def moved(self) -> tuple[Leaf, ...]:
        """Optimiser leaves that do not lie where their parameters do."""
        places = {leaf.name: leaf.mesh_axes for leaf in self.leaves if leaf.kind == "parameter"}
        moments = (leaf for leaf in self.leaves if leaf.kind == "optimizer" and leaf.of)
        return tuple(leaf for leaf in moments if leaf.mesh_axes != places[leaf.of])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the sums."""
        sums = {f"{kind}_bytes": self.bytes(kind) for kind in ("parameter", "optimizer")}
        return {"devices": math.prod(self.mesh.values()), **sums, **dataclasses.asdict(self)}

    def __rich__(self) -> Any:
        from rich import box
        from rich.table import Table

        devices = math.prod(self.mesh.values())
        over = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one"
        slices = " x ".join(f"{axis} {size}" for axis, size in self.dcn.items() if size > 1)
        title = f"{devices} devices: {over}" + (f"; across slices {slices}" if slices else "")
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True, title_justify="left")
        held = f"{self.bytes('parameter') / 2**20:,.1f}"
        table.add_column("parameter", footer="parameters of a device", overflow="fold")
        table.add_column("shape", no_wrap=True)
        table.add_column("split over", overflow="fold")
        table.add_column("a device holds", no_wrap=True)
        table.add_column("MiB", footer=held, justify="right", no_wrap=True)
        table.add_column("copies", justify="right", no_wrap=True)
        # Moments are shown only where they lie elsewhere than their parameter, as under ZeRO-1; else they would double
        # every row.
        parameters = {leaf.name: leaf for leaf in self.leaves if leaf.kind == "parameter"}
        moments = {f"optimiser of {leaf.of}": leaf for leaf in self.moved}  # both moments of a parameter lie alike
        for name, leaf in (parameters | moments).items():
            whole, part = ("x".join(map(str, shape)) for shape in (leaf.shape, leaf.local_shape))
            table.add_row(name, whole, leaf.split, part, f"{leaf.local_bytes / 2**20:,.1f}", str(leaf.copies))
        where = "two moments, each as shown or as its parameter" if moments else "two moments, each as its parameter"
        table.caption = f"optimiser: {self.bytes('optimizer') / 2**20:,.1f} MiB a device, {where}"
        table.caption_justify = "left"
        return table


def describe(cfg: config.Config, devices: int, slices: int = 1) -> Sharding:
    """The layout of the training state of `cfg`, whose vocabulary size is known, over `devices` in `slices`.

    Raises:
        UserError: the mesh does not fit the devices, rules collide, or a size does not divide.
    """
    layout = Layout.abstract(cfg.mesh, devices, slices)
    if not cfg.model.scanned:  # what is stacked here is then no axis
        unstacked = {**layout.rules, "layers": None}, {**layout.optimizer_rules, "layers": None}
        layout = dataclasses.replace(layout, rules=unstacked[0], optimizer_rules=unstacked[1])
    parameters, moments = _state(dataclasses.replace(cfg.model, layer_loop="scan"), cfg.numerics, cfg.train)
    leaves = (*_leaves("parameter", parameters, layout), *_leaves("optimizer", moments, layout.optimizer))
    return Sharding(dict(layout.mesh.shape), dict(layout.dcn), leaves)


class _Array(NamedTuple):
    """A leaf of the state, with the name and the logical axes of the parameter that it belongs to."""

    name: str
    array: jax.ShapeDtypeStruct
    of: str
    axes: Axes


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A parameter's name and logical axes: one leaf of a tree."""

    name: str
    axes: Axes


@functools.lru_cache(maxsize=4)
def _state(
    model: config.Model, numerics: config.Numerics, train: config.Train
) -> tuple[tuple[_Array, ...], tuple[_Array, ...]]:
    """The parameters and the leaves of the optimiser, on no mesh."""
    optimizer = make_optimizer(train)
    with precision(numerics):
        shapes, axes = abstract_params(Decoder(model, Policy.from_config(numerics)))
        moments = jax.eval_shape(optimizer.init, shapes)
    # Optax knows which of its leaves mirror parameters. Mapping "name and axes" instead of arrays through it labels
    # each moment with the parameter it belongs to; counters belong to none.
    owners: Any = jax.tree_util.tree_map_with_path(lambda path, _, at: _Owner(_dotted(path), at), shapes, axes)
    moment_owners = optax.tree.map_params(
        optimizer, lambda _, owner: owner, moments, owners, transform_non_params=lambda _: _Owner("", ())
    )

    def joined(tree: Any, owners: Any) -> tuple[_Array, ...]:
        flat = zip(jax.tree_util.tree_flatten_with_path(tree)[0], jax.tree.leaves(owners), strict=True)
        return tuple(_Array(_dotted(path), leaf, owner.name, owner.axes) for (path, leaf), owner in flat)

    return joined(shapes, owners), joined(moments, moment_owners)


def _leaves(kind: Literal["parameter", "optimizer"], arrays: Iterable[_Array], layout: Layout) -> Iterator[Leaf]:
    """Each array as the engine's `state_shardings` lays it."""
    prefix = "optimizer." if kind == "optimizer" else ""
    for name, array, of, axes in arrays:
        # The same call that the engine makes: what is printed is what will be, and a size that does not divide is
        # refused here as there.
        sharding = layout.sharding(axes, array.shape, prefix + of)
        local = tuple(sharding.shard_shape(array.shape))
        yield Leaf(
            name=name,
            kind=kind,
            of=of,
            shape=tuple(array.shape),
            dtype=str(array.dtype),
            axes=axes,
            mesh_axes=tuple(tuple(one for one in layout.along(axis) if layout.mesh.shape[one] > 1) for axis in axes),
            local_shape=local,
            local_bytes=math.prod(local) * array.dtype.itemsize,
            copies=layout.mesh.size // math.prod(layout.parts(axis) for axis in axes),
        )


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
