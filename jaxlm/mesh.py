"""The device mesh, the table of logical axes, and the sharding of any tree.

Parameters and activations carry logical axis names; `RULES` maps names to mesh axes. The table is the only place that
knows how a model is laid out: change a row, here or in `[mesh.rules]`, and every tensor with that name moves.

Devices are placed twice: slices along `[mesh.dcn]`, and the devices of each slice along `[mesh]`, so that the axes that
talk most have the fastest links. See docs/mesh.md.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import config
from jaxlm.config import AXES as AXES
from jaxlm.errors import UserError, did_you_mean

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "seq": "context",
    "features": None,
    # parameters, and activations split like them
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "inner": "tensor",
    "state": None,
}

SIZES = {
    "batch": "train.batch_size / train.microbatches",
    "seq": "data.seq_len",
    "vocab": "model.vocab_size",
    "embed": "model.d_model",
    "kv_heads": "model.n_kv_heads",
    "experts": "model.moe.n_experts",
}
"""Where the user sets the size of a logical axis; of the others several options have one."""

Axes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]

_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place logical axes on it."""

    mesh: Mesh | AbstractMesh
    rules: Rules = dataclasses.field(default_factory=lambda: RULES)
    optimizer_rules: Rules = dataclasses.field(default_factory=dict)
    """Rules of optimiser state, where they differ from `rules`."""
    dcn: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """The part of each axis that crosses slices, where there are several."""
    section: str = "mesh.rules"
    """Where the user changes `rules`."""

    @classmethod
    def from_config(cls, mesh: config.Mesh, devices: Sequence[Any] | None = None) -> Layout:
        """The layout of `[mesh]` over `devices` (default: all).

        Raises:
            UserError: the sizes of the axes do not fit the devices or their slices, or a rule names no axis.
        """
        devices = jax.devices() if devices is None else devices
        dcn, _ = _sizes(mesh, len(devices), slice_count(devices))
        return cls(Mesh(arrange(mesh, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)), *_rules(mesh), dcn)

    @classmethod
    def abstract(cls, mesh: config.Mesh, devices: int | None = None, slices: int = 1) -> Layout:
        """The layout of `[mesh]` over so many devices that need not be there; for None, -1 counts as 1.

        Raises:
            UserError: as `from_config`.
        """
        dcn, ici = _sizes(mesh, devices, slices)
        shape = tuple(dcn[axis] * ici[axis] for axis in AXES)
        return cls(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)), *_rules(mesh), dcn)

    @property
    def optimizer(self) -> Layout:
        """The layout of optimiser state: it lies where the parameters do, unless `[mesh.optimizer_rules]` says more."""
        if not self.optimizer_rules:
            return self
        rules = {**self.rules, **self.optimizer_rules}
        return dataclasses.replace(self, rules=rules, optimizer_rules={}, section="mesh.optimizer_rules")

    @property
    def platform(self) -> str:
        """Of the devices: `cpu`, `gpu` or `tpu`. Those of an abstract mesh are taken for ours."""
        return jax.default_backend() if isinstance(self.mesh, AbstractMesh) else self.mesh.devices.flat[0].platform

    def along(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that split a logical axis."""
        entry = self.rules[axis] if axis else None
        return () if entry is None else (entry,) if isinstance(entry, str) else entry

    def parts(self, axis: str | None) -> int:
        """Into how many parts a logical axis is split."""
        return math.prod(self.mesh.shape[one] for one in self.along(axis))

    def spec(self, axes: Axes, shape: Sequence[int] | None = None, name: str = "tensor") -> PartitionSpec:
        """Where the logical `axes` of a tensor lie.

        Raises:
            UserError: two axes want one mesh axis, or a mesh axis does not divide its dimension of `shape`.
        """
        taken: dict[str, str | None] = {}
        for axis in axes:
            for one in self.along(axis):
                if one in taken:
                    raise UserError(
                        f"{name}: {taken[one]} and {axis} both lie on the mesh axis {one}",
                        f"change {self.section}.{taken[one]} or {self.section}.{axis}",
                    )
                taken[one] = axis
        for size, axis in zip(shape or (), axes, strict=False):
            if axis and size % self.parts(axis):
                raise self._uneven(name, axis, size, shape or ())
        entries = [self.along(axis) for axis in axes]
        return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))

    def _uneven(self, name: str, axis: str, size: int, shape: Sequence[int]) -> UserError:
        parts = self.parts(axis)
        over = " x ".join(f"{one} {self.mesh.shape[one]}" for one in self.along(axis))
        over = f"{over} = {parts}" if len(self.along(axis)) > 1 else over.replace(" ", " = ")
        hint = f"the next {SIZES.get(axis, 'size')} that does is {-(-size // parts) * parts}"
        if math.gcd(size, parts) > 1:
            hint += f"; {size} divides over {math.gcd(size, parts)}"
        if axis not in ("batch", "seq"):  # each device would compute all of it
            hint += f"; {self.section}.{axis}=[] leaves it whole"
        return UserError(f"{name}: {axis} of {size} does not divide over {over} devices, in {list(shape)}", hint)

    def sharding(self, axes: Axes, shape: Sequence[int] | None = None, name: str = "tensor") -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    @property
    def replicated(self) -> NamedSharding:
        """The whole tensor on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Rows [B, T] of tokens."""
        return self.sharding(("batch", "seq"))

    def shardings(self, axes: Any, shapes: Any, prefix: str = "") -> Any:
        """The sharding of every leaf of a tree, given its tree of logical axes and its tree of shapes."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, names: self.sharding(
                names, leaf.shape, prefix + jax.tree_util.keystr(path, simple=True, separator=".")
            ),
            shapes,
            axes,
        )

    def rows(self, batch_size: int, devices: Collection[Any] = ()) -> np.ndarray:
        """The rows of a batch that `devices` (default: those of this process) hold, in order: all that it has to read.

        Processes that differ along an axis that does not split the batch hold the same rows.

        Raises:
            UserError: the batch does not divide over the devices that split it.
        """
        parts = self.sharding(("batch",), (batch_size,), "train.batch_size").devices_indices_map((batch_size,))
        held = [
            np.arange(batch_size)[parts[device]] for device in devices or self.sharding(("batch",)).addressable_devices
        ]
        return np.unique(np.concatenate(held))

    def place(
        self, batch: Mapping[str, np.ndarray], batch_size: int | None = None, axes: Mapping[str, Axes] | None = None
    ) -> dict[str, jax.Array]:
        """Lay a batch on the mesh, of which this process has its `rows` of `batch_size`, or all.

        Args:
            axes: the logical axes of each array; default: rows [B, T] of tokens.

        Raises:
            UserError: an array has no axes, or a size does not divide.
        """
        for name in batch.keys() - (axes or batch).keys():
            raise UserError(f"the batch's {name} has no axes", "name it in the columns of the recipe")
        places = {name: self.sharding(axes[name]) if axes else self.batch for name in batch}
        if batch_size is None or self.batch.is_fully_addressable:
            return jax.device_put(dict(batch), places)
        held = self.rows(batch_size)

        def lay(array: np.ndarray, along: Axes, place: NamedSharding) -> jax.Array:
            of_rows = bool(along) and along[0] == "batch"

            def part(index: Any) -> np.ndarray:  # a slice for each axis
                rows = np.searchsorted(held, np.arange(batch_size)[index[0]]) if of_rows else ...
                return array[rows][(slice(None), *index[1:])] if of_rows else array[index]

            shape = (batch_size, *array.shape[1:]) if of_rows else array.shape
            return jax.make_array_from_callback(shape, place, part)

        return {name: lay(x, axes[name] if axes else ("batch", "seq"), places[name]) for name, x in batch.items()}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While tracing inside, `constrain` places activations by this layout."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


def unsplit() -> bool:
    """Whether arrays are whole: no layout is active, or it has one device."""
    return split_layout() is None


def split_layout() -> Layout | None:
    """The active layout, if it has more than one device."""
    layout = _current.get()
    return None if layout is None or layout.mesh.size == 1 else layout


def platform() -> str:
    """What is compiled for, `cpu`, `gpu` or `tpu`: the devices of the active layout, which need not be here."""
    layout = _current.get()
    return jax.default_backend() if layout is None else layout.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the partitioner where an activation with these logical axes lies. Without an active layout: nothing."""
    layout = split_layout()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape, "activation"))


def over_rows(sums: Callable[..., Any], whole: Any, rows: Any) -> Any:
    """`sums(whole, rows)`, numbers that add up over rows, of the rows [B, T, ...] of each device and then of all.

    So a loop within `sums` goes over the tokens of one device, and what it carries, the gradient of `whole` above all,
    is added up over the devices once and not in every turn. Other axes are left to XLA's partitioner.
    """
    layout = split_layout()
    places = layout.spec(("batch", "seq")) if layout else ()
    # A tuple, for a set of strings has another order in each process, and the sum would wait for other devices there.
    along = tuple(axis for entry in places for axis in ((entry,) if isinstance(entry, str) else entry or ()))
    if layout is None or all(layout.mesh.shape[axis] == 1 for axis in along):
        return sums(whole, rows)

    def local(whole: Any, rows: Any) -> Any:
        return jax.lax.psum(sums(whole, rows), along)

    split = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(PartitionSpec(), places),
        out_specs=PartitionSpec(),
        axis_names=set(along),
        check_vma=False,
    )
    return split(whole, rows)


def arrange(mesh: config.Mesh, devices: Sequence[Any]) -> np.ndarray:
    """Devices by the five axes. What `[mesh.dcn]` splits lies in different slices, what `[mesh]` splits within one.

    A slice is what the hardware calls one (`slice_index`), or else, on GPUs and CPUs, an equal share of the devices in
    the order of their processes. Within it `mesh_utils` gives the nearest neighbours to the last axes.

    Raises:
        UserError: the sizes of the axes do not fit the devices or their slices.
    """
    devices = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    dcn, ici = _sizes(mesh, len(devices), slice_count(devices))
    count, hardware = math.prod(dcn.values()), len({_slice(device) for device in devices})
    if devices[0].platform == "tpu" and count != hardware:
        raise UserError(
            f"[mesh.dcn] {_product(dcn)} = {count}, slices of these chips: {hardware}",
            "mesh.dcn.data=-1 is one replica a slice",
        )
    share = len(devices) // count
    slices = [_nearest(ici, devices[i * share : (i + 1) * share]) for i in range(count)]
    split = np.stack(slices).reshape(*dcn.values(), *ici.values())
    both = [half * len(AXES) + axis for axis in range(len(AXES)) for half in (0, 1)]  # dcn and ici of an axis together
    return split.transpose(both).reshape([dcn[axis] * ici[axis] for axis in AXES])


def slice_count(devices: Sequence[Any]) -> int:
    """How many slices `mesh.dcn.AXIS = -1` stands for: those of the hardware, or, where it knows none, the hosts."""
    slices = len({_slice(device) for device in devices})
    knows = slices > 1 or devices[0].platform == "tpu"
    return slices if knows else len({device.process_index for device in devices})


def _nearest(ici: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice by the five axes."""
    shape = tuple(ici.values())
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # no axes of the torus multiply to the sizes asked for: parts of them must do
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", 0)


def _sizes(mesh: config.Mesh, devices: int | None, slices: int) -> tuple[dict[str, int], dict[str, int]]:
    """The axes over slices and within one, with nothing left open; for None, what is open counts as 1."""
    dcn = _filled(mesh.dcn.sizes, slices)
    count = math.prod(dcn.values())
    ici = _filled(mesh.sizes, 1 if devices is None else devices // count)
    if devices is not None and count * math.prod(ici.values()) != devices:
        fixed = count * math.prod(size for size in mesh.sizes.values() if size != -1)
        asked = f"[mesh] {_product(mesh.sizes)}" + (f", [mesh.dcn] {_product(dcn)}," if count > 1 else "")
        raise UserError(
            f"{asked} does not fit {devices} devices",
            f"{fixed}, the product of the others, must divide {devices}"
            if -1 in mesh.sizes.values()
            else "set one axis to -1",
        )
    return dcn, ici


def _filled(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {axis: max(total // fixed, 1) if size == -1 else size for axis, size in sizes.items()}


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _rules(mesh: config.Mesh) -> tuple[Rules, Rules]:
    """The tables of a layout: `RULES` with what the config changes, and what it changes for the optimiser alone."""
    for section in ("rules", "optimizer_rules"):
        for axis, along in getattr(mesh, section).items():
            key = f"mesh.{section}.{axis}"
            if axis not in RULES:
                raise UserError(f"{key}: there is no logical axis {axis!r}", did_you_mean(axis, RULES))
            for one in along:
                if one not in AXES:
                    raise UserError(f"{key}: there is no mesh axis {one!r}", did_you_mean(one, AXES))
            if len(set(along)) < len(along):
                raise UserError(f"{key} = {list(along)} names a mesh axis twice")
    return {**RULES, **mesh.rules}, mesh.optimizer_rules
