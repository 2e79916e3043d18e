"""The forward pass of a stage: what its loss is computed from, of a whole model or of adapters beside their base.

Shapes: B rows, T tokens, C drawn tokens of a row at most, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def forward(decoder: Any, params: Any, batch: Mapping[str, Any], key: Any) -> tuple[Any, tuple[Any, Any], Any]:
    """Hidden states [B, T, D] of the rows, the output matrix [D, V] with its bias, and what the routers did.

    Args:
        params: the tree of parameters, or `models.adapted.Adapted`.
        key: of dropout; None: nothing is dropped.

    Returns:
        Last is `train.expert_balance.Routed`; None where the model has no experts.
    """
    return forward_with_layers(decoder, params, batch, key, ())[:3]


def forward_with_layers(
    decoder: Any, params: Any, batch: Mapping[str, Any], key: Any, layers: Sequence[int]
) -> tuple[Any, tuple[Any, Any], Any, tuple[Any, ...]]:
    """As `forward`, with the outputs of some layers, as they are before the final norm.

    Args:
        layers: their numbers, from 0 on.

    Returns:
        What `forward` returns, and the output [B, T, D] of each of `layers`.
    """
    from jaxlm.models import adapted
    from jaxlm.train.expert_balance import collect

    variables, rows = adapted.variables(params), (batch["tokens"], batch["positions"], batch["segments"])
    random = decoder.config.random or isinstance(params, adapted.Adapted)
    rngs = {} if key is None or not random else {"dropout": key}
    options: dict[str, Any] = {"method": "hidden", "rngs": rngs, "mutable": ["routing", "outputs"]}
    (hidden_BTD, _), collections = decoder.apply(variables, *rows, layers=tuple(layers), **options)
    routed = collect(collections["routing"], decoder.config) if decoder.config.moes else None
    (kept,) = collections["outputs"]["kept"]
    return hidden_BTD, decoder.apply(variables, method="unembedding"), routed, tuple(kept[layer] for layer in layers)


def drawn_tokens(hidden_BTD: Any, batch: Mapping[str, Any], longest: int) -> tuple[Any, dict[str, Any]]:
    """Hidden states [B, C, D] and columns [B, C] of the tokens that a sample can have drawn, C = `longest`.

    They begin with the first token of a row that has a weight. Prompts need no logits, nor does padding, which costs
    most where the vocabulary is large. Places beyond the row have 0 everywhere.
    """
    import jax.numpy as jnp

    length = hidden_BTD.shape[1]
    if longest >= length:
        return hidden_BTD, dict(batch)
    first_B1 = jnp.argmax(batch["weights"] != 0, axis=1)[:, None]
    at_BC = first_B1 + jnp.arange(longest)

    def picked(x: Any) -> Any:
        of_tokens = x.shape == batch["weights"].shape
        return jnp.take_along_axis(x, at_BC, axis=1, mode="fill", fill_value=0) if of_tokens else x

    # A product with ones and zeros: its gradient is a product too, where that of a look-up is a slow scatter. Places
    # that are not asked for are 0 first, since 0 times an infinite one is not 0.
    places_T = jnp.arange(length)
    asked_BT = (places_T >= first_B1) & (places_T < first_B1 + longest)
    ones_BCT = (at_BC[..., None] == places_T).astype(hidden_BTD.dtype)
    finite_BTD = jnp.where(asked_BT[..., None], hidden_BTD, 0)
    hidden_BCD = jnp.einsum("bct,btd->bcd", ones_BCT, finite_BTD, precision="highest")
    return hidden_BCD, {name: picked(x) for name, x in batch.items()}


def with_routing(sums: Mapping[str, Any], routed: Any) -> dict[str, Any]:
    """The sums of a loss with the balancing terms of the experts, if there are any, which are means over tokens."""
    if routed is None:
        return dict(sums)
    means = {name: term * sums["weight"] for name, term in routed.means.items()}
    return {**sums, **means, **routed.counts, "loss": sums["loss"] + routed.loss * sums["weight"]}
