"""Balancing the experts: the terms of the loss, the selection bias, and what is reported of the load.

The routers leave their terms in the collection `routing` of a forward pass. All terms are of the real tokens of one
microbatch, on all devices; of the layers with experts the mean is taken, so a weight means the same at any depth.

Shapes: L layers with experts, E experts (the most of any layer; fewer are followed by zeros).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import config

TERMS = {"balance": "balance_loss", "z": "router_z", "entropy": "router_entropy"}
"""Means that are reported, and their names in the metrics."""


class Routed(NamedTuple):
    """What all routers of a forward pass tell."""

    loss: Float[Array, ""]
    """The balancing terms with their weights: the mean of the layers."""
    means: dict[str, Float[Array, ""]]
    """The terms without weights, by the names of the metrics."""
    counts: dict[str, Int[Array, "..."]]
    """`expert_load` [L, E], assignments, and `dropped`, those beyond the capacity."""


def collect(routing: Mapping[str, Any], model: config.Model) -> Routed:
    """Bring together what the routers left in the collection `routing`."""
    layers = [_at(routing, router.path, router.index) for router in _routers(model)]
    mean = lambda name: jnp.mean(jnp.stack([layer[name] for layer in layers]))  # noqa: E731
    most = max(len(layer["load"]) for layer in layers)
    loads = [jnp.pad(layer["load"], (0, most - len(layer["load"]))) for layer in layers]
    counts = {"expert_load": jnp.stack(loads), "dropped": sum(layer["dropped"] for layer in layers)}
    return Routed(mean("loss"), {name: mean(term) for term, name in TERMS.items()}, counts)


def update_biases(params: Any, load_LE: Int[Array, "l e"], model: config.Model) -> Any:
    """Move each selection bias by `rate * sign(mean load - load)` (Wang et al. 2024, algorithm 1)."""
    for load_E, router in zip(load_LE, _routers(model), strict=True):
        if router.options.selection_bias:
            load = load_E[: router.options.n_experts].astype(float)
            change = router.options.bias_update_rate * jnp.sign(jnp.mean(load) - load)
            params = _add(params, (*router.path, "selection_bias"), router.index, change)
    return params


def load_metrics(params: Any, counts: Mapping[str, Array], model: config.Model) -> dict[str, Array]:
    """`expert_load`, the share `dropped`, `load_max` (the fullest expert over the mean, of the worst layer), and
    `bias_range` (largest minus smallest selection bias, of the widest layer) where there is one."""
    load_LE, routers = counts["expert_load"], list(_routers(model))
    fullest = [
        jnp.max(load) * router.options.n_experts / jnp.maximum(jnp.sum(load), 1)
        for load, router in zip(load_LE, routers, strict=True)
    ]
    biases = [_at(params, r.path, r.index)["selection_bias"] for r in routers if r.options.selection_bias]
    ranges = {"bias_range": jnp.max(jnp.stack([jnp.ptp(bias) for bias in biases]))} if biases else {}
    return {
        "expert_load": load_LE,
        "dropped": counts["dropped"] / jnp.maximum(jnp.sum(load_LE), 1),
        "load_max": jnp.max(jnp.stack(fullest)),
        **ranges,
    }


class _Router(NamedTuple):
    """A router of the live tree: where it is, in which row of a stack (None: no stack), and its options."""

    path: tuple[str, ...]
    index: int | None
    options: config.MoE


def _routers(model: config.Model) -> Iterator[_Router]:
    """The routers in the order of the layers."""
    slots = len(model.pattern)
    for i in range(model.n_layers):
        halves = model.halves(model.pattern[i % slots])
        if halves.ffn_name == "moe":
            path = ("layers", f"slot_{i % slots}") if model.scanned else (f"layers_{i}",)
            yield _Router((*path, "ffn", "router"), i // slots if model.scanned else None, halves.ffn.moe)


def _at(tree: Any, path: tuple[str, ...], index: int | None) -> dict[str, Array]:
    for key in path:
        tree = tree[key]
    return {
        name: leaf if index is None else leaf[index] for name, leaf in tree.items() if not isinstance(leaf, Mapping)
    }


def _add(tree: Any, path: tuple[str, ...], index: int | None, change: Array) -> Any:
    """The tree with `change` added to one leaf, or to one row of it."""
    if not path:
        change = change.astype(tree.dtype)
        return tree + change if index is None else tree.at[index].add(change)
    return {**tree, path[0]: _add(tree[path[0]], path[1:], index, change)}
