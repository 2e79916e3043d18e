"""The device mesh, the table of logical axes, and the sharding of any tree.

Parameters and activations carry logical axis names; `RULES` maps names to mesh axes. The table is the only place that
knows how a model is laid out: change a row and every tensor with that name moves.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import config
from jaxlm.errors import UserError

AXES = ("data", "fsdp", "expert", "context", "tensor")

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

Axes = tuple[str | None, ...]

_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that place logical axes on it."""

    mesh: Mesh
    rules: Mapping[str, str | tuple[str, ...] | None] = dataclasses.field(default_factory=lambda: RULES)

    @classmethod
    def from_config(cls, mesh: config.Mesh, devices: Sequence[Any] | None = None) -> Layout:
        """The layout of `[mesh]` over `devices` (default: all).

        Raises:
            UserError: the axis sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = dataclasses.asdict(mesh)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        free = next((name for name, size in sizes.items() if size == -1), None)
        if free:
            sizes[free] = len(devices) // fixed
        if math.prod(sizes.values()) != len(devices):
            asked = " x ".join(f"{name} {size}" for name, size in dataclasses.asdict(mesh).items())
            raise UserError(f"[mesh] {asked} does not fit {len(devices)} devices", "set one axis to -1")
        shape = tuple(sizes[name] for name in AXES)
        return cls(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices))

    def spec(self, axes: Axes, shape: Sequence[int] | None = None, name: str = "tensor") -> PartitionSpec:
        """Where the logical `axes` of a tensor lie.

        Raises:
            UserError: two axes want one mesh axis, or a mesh axis does not divide its dimension of `shape`.
        """
        placed = [self.rules[axis] if axis else None for axis in axes]
        used = [one for entry in placed for one in _mesh_axes(entry)]
        if len(used) != len(set(used)):
            raise UserError(f"{name}: axes {axes} use one mesh axis twice: {placed}", "mend the rules")
        for size, axis, entry in zip(shape or (), axes, placed, strict=False):
            parts = math.prod(self.mesh.shape[one] for one in _mesh_axes(entry))
            if size % parts:
                raise UserError(f"{name}: {axis} of {size} does not divide over {entry} = {parts} devices")
        return PartitionSpec(*placed)

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

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """The sharding of every leaf of a tree, given its tree of logical axes and its tree of shapes."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf, names: self.sharding(
                names, leaf.shape, jax.tree_util.keystr(path, simple=True, separator=".")
            ),
            shapes,
            axes,
        )

    def rows(self, batch_size: int, devices: Collection[Any] = ()) -> np.ndarray:
        """The rows of a batch that `devices` (default: those of this process) hold, in order: all that it has to read.

        Processes that differ along an axis that does not split the batch hold the same rows.
        """
        parts = self.sharding(("batch",)).devices_indices_map((batch_size,))
        devices = devices or self.mesh.local_devices
        return np.unique(np.concatenate([np.arange(batch_size)[parts[device]] for device in devices]))

    def place(self, batch: Mapping[str, np.ndarray], batch_size: int | None = None) -> dict[str, jax.Array]:
        """Lay a batch [B, T] on the mesh, of which this process has its `rows` of `batch_size`, or all."""
        if batch_size is None or self.batch.is_fully_addressable:
            return jax.device_put(dict(batch), self.batch)
        held = self.rows(batch_size)

        def lay(array: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:  # a slice for each axis
                return array[np.searchsorted(held, np.arange(batch_size)[index[0]]), index[1]]

            return jax.make_array_from_callback((batch_size, array.shape[1]), self.batch, part)

        return {key: lay(array) for key, array in batch.items()}

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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the partitioner where an activation with these logical axes lies. Without an active layout: nothing."""
    layout = split_layout()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(axes, x.shape, "activation"))


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
