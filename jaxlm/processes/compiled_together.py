"""Processes drift apart while they compile, and the first exchange of a group of devices does not wait for long.

On CPUs gloo connects a group of devices when it exchanges something for the first time, and gives up after 30 s; later
exchanges wait for half an hour. So the groups of a mesh are connected at the start, in a program that compiles at once,
and a large program is compiled by all processes before one of them runs it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlm.processes import meet


class CompiledTogether:
    """A jitted function that no process runs before all have compiled it. A process alone calls it as it is.

    Args:
        jitted: what `jax.jit` returns; all processes call it with arguments of the same shapes, in the same order.
        name: what it computes, for messages.
    """

    def __init__(self, jitted: Any, name: str) -> None:
        self._jitted, self._name = jitted, name
        self._compiled: set[Hashable] = set()

    def __call__(self, *args: Any) -> Any:
        """Compute.

        Raises:
            UserError: the processes have compiled programs that differ.
            MissingPeersError: the first process ended before all had compiled.
        """
        if jax.process_count() > 1 and (form := _form(args)) not in self._compiled:
            lowered = self.lower(*args)
            lowered.compile()  # jax keeps it: the call below compiles nothing
            # Two programs that differ in the order of their collectives wait for each other.
            meet.agree({f"the program of {self._name}": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]})
            self._compiled.add(form)
        return self._jitted(*args)

    def lower(self, *args: Any) -> Any:
        """As `jax.jit(f).lower`."""
        return self._jitted.lower(*args)


def connect(mesh: Mesh | AbstractMesh) -> None:
    """Let the devices of all processes exchange once along every group of axes of `mesh`, and process by process.

    GPUs and TPUs wait longer, and each group takes memory there, so they connect when they need to.

    Raises:
        MissingPeersError: the first process ended before all were here.
    """
    if jax.process_count() == 1 or isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "cpu":
        return
    devices = np.array(jax.devices()).reshape(jax.process_count(), -1)
    for grid in (mesh, Mesh(devices, ("process", "local"))):  # jax's and Orbax's own exchanges go by the second
        one_each = NamedSharding(grid, PartitionSpec(grid.axis_names))
        ones = jax.make_array_from_callback((grid.size,), one_each, lambda index: np.ones(1, np.float32))
        jax.block_until_ready(CompiledTogether(_exchange(grid), "the exchange of all devices")(ones))


def everywhere(value: bool) -> bool:
    """Whether it is so in all processes, which all ask."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value


def _exchange(grid: Mesh) -> Callable[..., Any]:
    """A program that adds up along each set of the axes that have several devices."""
    axes = [axis for axis, size in grid.shape.items() if size > 1]
    groups = [group for count in range(1, len(axes) + 1) for group in itertools.combinations(axes, count)]

    def add_up(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, group) for group in groups]

    along = PartitionSpec(grid.axis_names)
    return jax.jit(jax.shard_map(add_up, mesh=grid, in_specs=along, out_specs=along, check_vma=False))


def _form(args: Any) -> Hashable:
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
