"""Sequences split over the devices of a mesh axis: what they pass to each other. For use within `jax.shard_map`.

Device r of C holds tokens r T to (r + 1) T - 1 of each row. `zigzag` lays them out for causal attention, where a late
token has more to do than an early one: a device then holds part r and part 2 C - 1 - r of 2 C.

Shapes: B batch, T tokens of one device, C devices, J tokens before.
"""

from __future__ import annotations

from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from jaxlm.typed_jax import all_gather, ppermute, tree_map

_Tree = TypeVar("_Tree")
"""Of arrays [B, T, ...]."""


def shift(tree: _Tree, axis: str, hops: int = 1, *, around: bool = False) -> _Tree:
    """What the device `hops` to the left holds; zero where there is none, unless the devices form a ring."""
    devices = lax.axis_size(axis)
    pairs = [(i, (i + hops) % devices) for i in range(devices) if around or i + hops < devices]
    return ppermute(tree, axis, pairs) if pairs else tree_map(jnp.zeros_like, tree)


def halo(x_BT: Shaped[Array, "b t ..."], tokens: int, axis: str) -> Shaped[Array, "b j ..."]:
    """The `tokens` tokens before this device's first, zero before the first of the row."""
    # One device may hold fewer tokens than a window reaches back, so the halo is gathered over as many hops as it
    # takes; the nearest device's tokens stand last. Beyond the first device `shift` gives zeros.
    own = x_BT.shape[1]
    parts: list[Array] = []
    for hops, done in enumerate(range(0, tokens, own), 1):
        parts.append(shift(x_BT[:, own - min(own, tokens - done) :], axis, hops))
    return jnp.concatenate([*reversed(parts), x_BT[:, :0]], axis=1)


def gather(tree: _Tree, axis: str) -> _Tree:
    """The tokens of all devices."""
    return all_gather(tree, axis, axis=1, tiled=True)


def zigzag(tree: _Tree, axis: str) -> _Tree:
    """Parts r and 2 C - 1 - r of 2 C, one behind the other. T is even."""
    devices, even_device = lax.axis_size(axis), lax.axis_index(axis) % 2 == 0
    # A permutation sends one part from each device and receives one. Device i holds parts 2 i and 2 i + 1; every device
    # receives exactly one even and one odd part, so two permutations, each over all devices, do it.
    firsts, seconds = _homes(devices)

    def move(x: Array) -> Array:
        first, second = jnp.split(x, 2, axis=1)
        even, odd = ppermute(first, axis, firsts), ppermute(second, axis, seconds)
        return jnp.where(even_device, jnp.concatenate([even, odd], axis=1), jnp.concatenate([odd, even], axis=1))

    return tree_map(move, tree)


def unzigzag(tree: _Tree, axis: str) -> _Tree:
    """The way back from `zigzag`."""
    devices, even_device = lax.axis_size(axis), lax.axis_index(axis) % 2 == 0
    firsts, seconds = ([(j, i) for i, j in pairs] for pairs in _homes(devices))

    def move(x: Array) -> Array:
        early, late = jnp.split(x, 2, axis=1)
        even, odd = jnp.where(even_device, early, late), jnp.where(even_device, late, early)
        return jnp.concatenate([ppermute(even, axis, firsts), ppermute(odd, axis, seconds)], axis=1)

    return tree_map(move, tree)


def _homes(devices: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From which device to which its first part (an even one) and its second go. An even device gets one of each:
    its early part is even, its late one odd; on an odd device it is the other way round."""
    home = [min(part, 2 * devices - 1 - part) for part in range(2 * devices)]
    return list(enumerate(home[::2])), list(enumerate(home[1::2]))


def before(ends: Array, decays: Array, axis: str, *, reverse: bool = False) -> Array:
    """What a linear recurrence `h' = decay h + end`, one step a device, has carried to this device from zero.

    Args:
        ends, decays: of this device; decays may have axes of size 1.
        reverse: from the last device to the first.
    """
    ends_C, decays_C = all_gather((ends, decays), axis)
    own, carried = lax.axis_index(axis), jnp.zeros_like(ends)
    devices = lax.axis_size(axis)
    # All ends and decays are gathered, and every device folds those before its own: the sums are taken in the same
    # order everywhere, and C steps on small states cost less than C messages one after the other.
    for other in range(devices - 1, 0, -1) if reverse else range(devices - 1):
        passed = other > own if reverse else other < own
        carried = jnp.where(passed, decays_C[other] * carried + ends_C[other], carried)
    return carried
