"""The balancing terms of experts in the loss of every stage: the mirror of `jaxlm.recipes.forward`."""

from __future__ import annotations

from torch_ref.train.expert_balance import Routed
from torch_ref.train.step import Sums


def with_routing(sums: Sums, routed: Routed | None) -> Sums:
    """The sums of a loss with the balancing terms of the experts, if there are any, which are means over tokens."""
    if routed is None:
        return dict(sums)
    means = {name: term * sums["weight"] for name, term in routed.means.items()}
    return {**sums, **means, **routed.counts, "loss": sums["loss"] + routed.loss * sums["weight"]}
