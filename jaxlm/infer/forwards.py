"""The compiled forwards of one model: hidden states, logits, log-probabilities.

Shapes: B batch, T length, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, Params
from jaxlm.objectives.logprobs import token_logps


def compiled_forwards(decoder: Decoder, layout: Layout | None) -> dict[str, Callable[..., Any]]:
    """Functions of (params, tokens, positions, segments), by name: what is traced holds the layout."""

    def apply(params: Params, *inputs: Any, method: str) -> Any:
        if layout is None:
            return decoder.apply({"params": params}, *inputs, method=method)
        with layout.active():
            return decoder.apply({"params": params}, *inputs, method=method)

    def hidden(params: Params, *inputs: Any) -> Any:
        return apply(params, *inputs, method="hidden")[0]

    def logits(params: Params, *inputs: Any) -> Any:
        return apply(params, *inputs, method="__call__")[0]

    def log_probs(params: Params, tokens: Any, positions: Any, segments: Any, targets: Any) -> Any:
        hidden_BTD = hidden(params, tokens, positions, segments)
        kernel_DV, bias_V = apply(params, method="unembedding")
        return token_logps(hidden_BTD, kernel_DV, bias_V, targets).logps

    return {"hidden": jax.jit(hidden), "logits": jax.jit(logits), "log_probs": jax.jit(log_probs)}
