"""The experts of a mixture: each token passes the feed-forwards that its router chose, and their outputs are summed.

`naive` computes every expert for every token, masked: the readable reference, which costs E / K times too much. The
other implementation gathers the tokens of one expert after the other. The weight of an assignment multiplies the hidden
layer, which by linearity is to multiply the output.

Shapes: T tokens, D width, F width of one expert, E experts, K experts of one token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.numerics import wide, wide_matmul
from torch_ref.ops import ffn


class Experts(NamedTuple):
    """The weights of all experts; `gate` is None for activations of one matrix, biases may be None."""

    gate: Float[Tensor, "e d f"] | None
    up: Float[Tensor, "e d f"]
    down: Float[Tensor, "e f d"]
    gate_bias: Float[Tensor, "e f"] | None = None
    up_bias: Float[Tensor, "e f"] | None = None
    down_bias: Float[Tensor, "e d"] | None = None


def moe(
    x_TD: Float[Tensor, "t d"],
    weights_TK: Float[Tensor, "t k"],
    experts_TK: Int[Tensor, "t k"],
    parameters: Experts,
    *,
    activation: str,
    impl: str = "auto",
) -> Float[Tensor, "t d"]:
    """`sum_k weight_k expert_k(x)` for each token (Shazeer et al. 2017, equation 1), in the dtype of x.

    Args:
        weights_TK: float32 or wider.
        experts_TK: the chosen experts; E or more: none.
        activation: a name of `ops.ffn`.
        impl: `naive`, or anything else for the loop over gathered tokens.
    """
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=weights_TK.dtype)
    for e, one in enumerate(_single(parameters)):
        chosen_TK = experts_TK == e
        weights_T = weights_TK.masked_fill(~chosen_TK, 0).sum(dim=-1)
        if impl == "naive":
            y_TD = y_TD + _down(_activate(activation, *_hidden(x_TD, one)), weights_T, one)
        else:
            rows = chosen_TK.any(dim=-1).nonzero()[:, 0]
            hidden = _activate(activation, *_hidden(x_TD[rows], one))
            y_TD = y_TD.index_add(0, rows, _down(hidden, weights_T[rows], one))
    return y_TD.to(x_TD.dtype)


def _single(parameters: Experts) -> Iterator[Experts]:
    """The weights of each expert; taken by `unbind`, whose gradient is stacked once, not added to zeros E times."""
    unbound: dict[str, Any] = {name: p.unbind() for name, p in parameters._asdict().items() if p is not None}
    for number in range(len(parameters.up)):
        yield Experts(**{"gate": None, **{name: each[number] for name, each in unbound.items()}})


def _activate(activation: str, gate: Tensor | None, up: Tensor) -> Tensor:
    return ffn.activate(activation, up) if gate is None else ffn.gated(activation, gate, up)


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    """`y + bias`, added wide."""
    return y if bias is None else (y.to(wide(y.dtype)) + bias.to(wide(y.dtype))).to(y.dtype)


def _times(y: Tensor, weights: Tensor) -> Tensor:
    """Rows of y times their weights, multiplied wide."""
    return (y.to(weights.dtype) * weights[:, None]).to(y.dtype)


def _hidden(x: Tensor, one: Experts) -> tuple[Tensor | None, Tensor]:
    """Both pre-activations of one expert."""
    return (None if one.gate is None else _plus(x @ one.gate, one.gate_bias)), _plus(x @ one.up, one.up_bias)


def _down(hidden: Tensor, weights: Tensor, one: Experts) -> Tensor:
    """What one expert adds to the output, wide."""
    y = wide_matmul(_times(hidden, weights), one.down)
    return y if one.down_bias is None else y + weights[:, None] * one.down_bias.to(weights.dtype)
