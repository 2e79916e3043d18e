"""Balancing the experts: the terms of the loss, the selection bias, and what is reported of the load.

The routers keep the terms of their last forward pass. All terms are of the real tokens of one microbatch; of the layers
with experts the mean is taken, so a weight means the same at any depth.

Shapes: L layers with experts, E experts (the most of any layer; fewer are followed by zeros).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from torch_ref.models.moe import Router
from torch_ref.numerics import wide

TERMS = {"balance": "balance_loss", "z": "router_z", "entropy": "router_entropy"}
"""Means that are reported, and their names in the metrics."""


class Routed(NamedTuple):
    """What all routers of a forward pass tell."""

    loss: Float[Tensor, ""]
    """The balancing terms with their weights: the mean of the layers."""
    means: dict[str, Float[Tensor, ""]]
    """The terms without weights, by the names of the metrics."""
    counts: dict[str, Int[Tensor, "..."]]
    """`expert_load` [L, E], assignments, and `dropped`, those beyond the capacity."""


def collect(decoder: nn.Module) -> Routed:
    """Bring together what the routers keep of the last forward pass."""
    routers = _routers(decoder)
    most = max(router.config.moe.n_experts for router in routers)
    loads = [F.pad(router.routing.load, (0, most - len(router.routing.load))) for router in routers]
    means = {
        name: torch.stack([getattr(router.routing, term) for router in routers]).mean() for term, name in TERMS.items()
    }
    dropped = torch.stack([router.routing.dropped for router in routers]).sum()
    counts = {"expert_load": torch.stack(loads), "dropped": dropped}
    return Routed(torch.stack([router.loss for router in routers]).mean(), means, counts)


@torch.no_grad()
def update_biases(decoder: nn.Module, load_LE: Int[Tensor, "l e"]) -> None:
    """Move each selection bias by `rate * sign(mean load - load)` (Wang et al. 2024, algorithm 1)."""
    for load_E, router in zip(load_LE, _routers(decoder), strict=True):
        if router.selection_bias is not None:
            load = load_E[: router.config.moe.n_experts].to(wide(router.weight.dtype))
            change = router.config.moe.bias_update_rate * torch.sign(load.mean() - load)
            router.selection_bias.add_(change.to(router.selection_bias.dtype))


@torch.no_grad()
def load_metrics(decoder: nn.Module, counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`expert_load`, the share `dropped`, `load_max` (the fullest expert over the mean, of the worst layer), and
    `bias_range` (largest minus smallest selection bias, of the widest layer) where there is one."""
    routers = _routers(decoder)
    load_LE, width = counts["expert_load"], wide(routers[0].weight.dtype)
    fullest = [
        load.max() * router.config.moe.n_experts / load.sum().clamp(min=1).to(width)
        for load, router in zip(load_LE, routers, strict=True)
    ]
    biases = [router.selection_bias for router in routers if router.selection_bias is not None]
    ranges = {"bias_range": torch.stack([bias.max() - bias.min() for bias in biases]).max()} if biases else {}
    return {
        "expert_load": load_LE,
        "dropped": counts["dropped"] / load_LE.sum().clamp(min=1).to(width),
        "load_max": torch.stack(fullest).max(),
        **ranges,
    }


def _routers(decoder: nn.Module) -> list[Router]:
    """The routers in the order of the layers."""
    return [module for module in decoder.modules() if isinstance(module, Router)]
