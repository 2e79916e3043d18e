"""Parts that the losses of stages share: the mirror of `jaxlm.recipes.forward`.

Shapes: B rows, T tokens, C drawn tokens of a row at most, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ref.train.expert_balance import Routed
from torch_ref.train.step import Batch, Sums


def drawn_tokens(hidden_BTD: Tensor, batch: Batch, longest: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states [B, C, D] and columns [B, C] of the tokens that a sample can have drawn, C = `longest`.

    They begin with the first token of a row that has a weight. Prompts need no logits, nor does padding, which costs
    most where the vocabulary is large. Places beyond the row have 0 everywhere.
    """
    length = hidden_BTD.shape[1]
    if longest >= length:
        return hidden_BTD, dict(batch)
    first_B1 = (batch["weights"] != 0).int().argmax(dim=1, keepdim=True)
    at_BC = first_B1 + torch.arange(longest, device=first_B1.device)
    inside_BC, at_BC = at_BC < length, at_BC.clamp(max=length - 1)

    def picked(x: Tensor) -> Tensor:
        return torch.where(inside_BC, x.gather(1, at_BC), 0) if x.shape == batch["weights"].shape else x

    hidden_BCD = torch.where(inside_BC[..., None], hidden_BTD.take_along_dim(at_BC[..., None], dim=1), 0)
    return hidden_BCD, {name: picked(x) for name, x in batch.items()}


def with_routing(sums: Sums, routed: Routed | None) -> Sums:
    """The sums of a loss with the balancing terms of the experts, if there are any, which are means over tokens."""
    if routed is None:
        return dict(sums)
    means = {name: term * sums["weight"] for name, term in routed.means.items()}
    return {**sums, **means, **routed.counts, "loss": sums["loss"] + routed.loss * sums["weight"]}
