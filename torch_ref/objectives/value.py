"""The clipped loss of a value model, and how much of the returns it knows.

    V = value of the state in which a token was drawn    V^o = the same when it was drawn    G = return

Shapes: B samples, one a row; T length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class ValueLoss(NamedTuple):
    """Sums over the trained tokens; divide by `weight` for means."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    clipped: Float[Tensor, ""]
    """Tokens whose gradient the clip takes away."""
    error: Float[Tensor, ""]
    """G - V, and its square, G, and its square: for `explained_variance`."""
    squared_error: Float[Tensor, ""]
    returns: Float[Tensor, ""]
    squared_returns: Float[Tensor, ""]
    weight: Float[Tensor, ""]

    @property
    def explained_variance(self) -> Float[Tensor, ""]:
        """1 - var(G - V) / var(G): 1 for values that know the returns, 0 for a constant."""
        error, returns = self.error / self.weight, self.returns / self.weight
        variance = self.squared_returns / self.weight - returns**2
        return 1 - (self.squared_error / self.weight - error**2) / variance


def value_loss(
    values_BT: Float[Tensor, "b t"],
    old_BT: Float[Tensor, "b t"],
    returns_BT: Float[Tensor, "b t"],
    weights_BT: Float[Tensor, "b t"],
    *,
    clip: float = 0.2,
) -> ValueLoss:
    """Sums of max((V - G)^2, (V^o + clip(V - V^o, -e, e) - G)^2) / 2, the clip of OpenAI Baselines' PPO2.

    Args:
        clip: e; 0 for no clip.
    """
    trained_BT = weights_BT != 0
    values_BT, old_BT, returns_BT = (torch.where(trained_BT, x, 0) for x in (values_BT, old_BT, returns_BT))
    error_BT = returns_BT - values_BT
    near_BT = old_BT + torch.clamp(values_BT - old_BT, -clip, clip) if clip else values_BT
    loss_BT = torch.maximum(error_BT**2, (near_BT - returns_BT) ** 2) / 2
    # Within the clip both squares are the same but for rounding, which must not count.
    clipped_BT = ((values_BT - old_BT).abs() > clip) & ((near_BT - returns_BT) ** 2 > error_BT**2)
    terms = (loss_BT, clipped_BT, error_BT, error_BT**2, returns_BT, returns_BT**2, trained_BT)
    return ValueLoss(*(torch.sum(term * weights_BT) for term in terms))
