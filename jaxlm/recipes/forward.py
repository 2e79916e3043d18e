"""The forward pass of a stage: what its loss is computed from, of a whole model or of adapters beside their base.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def forward(decoder: Any, params: Any, batch: Mapping[str, Any], key: Any) -> tuple[Any, tuple[Any, Any], Any]:
    """Hidden states [B, T, D] of the rows, the output matrix [D, V] with its bias, and what the routers did.

    Args:
        params: the tree of parameters, or `models.adapted.Adapted`.
        key: of dropout; None: nothing is dropped.

    Returns:
        Last is `train.expert_balance.Routed`; None where the model has no experts.
    """
    from jaxlm.models import adapted
    from jaxlm.train.expert_balance import collect

    variables, rows = adapted.variables(params), (batch["tokens"], batch["positions"], batch["segments"])
    random = decoder.config.random or isinstance(params, adapted.Adapted)
    rngs = {} if key is None or not random else {"dropout": key}
    (hidden_BTD, _), collections = decoder.apply(variables, *rows, method="hidden", rngs=rngs, mutable=["routing"])
    routed = collect(collections["routing"], decoder.config) if decoder.config.moes else None
    return hidden_BTD, decoder.apply(variables, method="unembedding"), routed


def with_routing(sums: Mapping[str, Any], routed: Any) -> dict[str, Any]:
    """The sums of a loss with the balancing terms of the experts, if there are any, which are means over tokens."""
    if routed is None:
        return dict(sums)
    means = {name: term * sums["weight"] for name, term in routed.means.items()}
    return {**sums, **means, **routed.counts, "loss": sums["loss"] + routed.loss * sums["weight"]}
