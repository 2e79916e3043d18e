"""Context parallelism: ops that mix tokens, each device with its part of every row.

What works token by token is left to XLA's partitioner. Attention, convolutions and scans run in `jax.shard_map`, where
they pass to each other just what they need: `ops/attention/ring.py` and the `axis` of `ops/ssm`. See
docs/context.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from jaxlm.errors import UserError
from jaxlm.mesh import Axes, platform, split_layout
from jaxlm.ops.attention.visible import Mixed
from jaxlm.ops.site import Site

ROW = ("batch", "seq")
HEADS = (*ROW, "heads", "head_dim")


def sequence_axis() -> str | None:
    """The mesh axis that splits the sequence in the active layout, if one does.

    Raises:
        UserError: more than one does.
    """
    axes = _mesh_axes("seq")
    if len(axes) > 1:
        raise UserError(f"the rules split `seq` over {' and '.join(axes)}", "one mesh axis can split the sequence")
    return axes[0] if axes else None


def over_sequence(op: Callable[..., Any], arguments: Sequence[Axes], results: Any) -> Callable[..., Any]:
    """`op(*arrays, axis=...)` of each device's parts of arrays, all leaves of one argument having the same axes.

    Where nothing splits the sequence: `op(*arrays, axis=None)` of the arrays themselves.

    Args:
        arguments: logical axes of each argument; it may be None.
        results: a tree like that of the results, with logical axes as its leaves.

    Raises:
        UserError: a dimension does not divide.
    """
    layout, axis = split_layout(), sequence_axis()
    if layout is None or axis is None:
        return functools.partial(op, axis=None)
    is_axes = lambda leaf: type(leaf) is tuple and all(name is None or isinstance(name, str) for name in leaf)  # noqa: E731
    out_specs = jax.tree.map(layout.spec, results, is_leaf=is_axes)

    def run(*arrays: Any) -> Any:
        in_specs = tuple(
            jax.tree.map(lambda x, axes=axes: layout.spec(axes, x.shape, "activation"), array)
            for array, axes in zip(arrays, arguments, strict=True)
        )
        local = functools.partial(op, axis=axis)
        return jax.shard_map(local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return run


def attention_site(cached: bool) -> Site:
    """Where attention computes, on the active layout; the queries of a cache see all of it, so nothing is split."""
    return Site(platform(), split_layout(), _attend_over_sequence if sequence_axis() and not cached else None)


def _attend_over_sequence(op: Callable[..., Any], merged: bool, q: Array, k: Array, v: Array, places: Any) -> Any:
    """See `Site.over_sequence`; every device has a kv head for each of its query heads."""
    results = Mixed(HEADS, HEADS[:3]) if merged else HEADS  # pyright: ignore[reportArgumentType]
    split = over_sequence(op, (HEADS, HEADS, HEADS, ROW), results)
    return split(q, repeated(k, 2, "heads"), repeated(v, 2, "heads"), places)


def repeated(x: Shaped[Array, "..."], dimension: int, name: str) -> Shaped[Array, "..."]:
    """x with each entry of `dimension` as often as it takes to split it as the axis `name` is split.

    A kv head that serves query heads on several devices is then on each of them, and so is a group of Mamba-2.
    """
    layout, size = split_layout(), x.shape[dimension]
    parts = 1 if layout is None else math.prod(layout.mesh.shape[one] for one in _mesh_axes(name))
    return jnp.repeat(x, math.lcm(size, parts) // size, axis=dimension) if size % parts else x


def _mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of more than one device that split a logical axis."""
    layout = split_layout()
    if layout is None:
        return ()
    (entry,) = layout.spec((name,))
    entry = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(one for one in entry if layout.mesh.shape[one] > 1)
