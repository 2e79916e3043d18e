"""A block: a token mixer and a channel mixer, each with its norm and residual.

Shapes: B batch, T length, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.attention import Attention
from torch_ref.models.ffn import MLP
from torch_ref.models.layers import Norm
from torch_ref.models.mamba import Mamba, Mamba2
from torch_ref.models.moe import MoE
from torch_ref.numerics import Policy
from torch_ref.ops.attention.attend import Places

Tables = tuple[tuple[Tensor, Tensor], ...]
"""Sine and cosine of every rotation of the model, in the order of `config.Model.ropes`."""

MIXERS = {"attention": Attention, "mamba": Mamba, "mamba2": Mamba2}
FFNS = {"mlp": MLP, "moe": MoE}


class Block(nn.Module):
    """Pre-norm `x + f(norm(x))` or post-norm `norm(x + f(x))`, for the mixer and then for the feed-forward."""

    def __init__(self, kind: str, config: config.Model, policy: Policy) -> None:
        super().__init__()
        halves, rope = config.halves(kind), config.halves(kind).mixer.rope
        self.config = config
        self.table = config.ropes.index(rope) if halves.mixer_name == "attention" and rope else None
        self.mixer = MIXERS[halves.mixer_name](halves.mixer, policy)
        self.mixer_norm = Norm(config.norm, config.norm_eps, policy, config.d_model)
        self.ffn = FFNS[halves.ffn_name](halves.ffn, policy) if halves.ffn_name else None
        if halves.ffn_name:
            self.ffn_norm = Norm(config.norm, config.norm_eps, policy, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Float[Tensor, "b t d"], places: Places, ropes: Tables, cache: Any
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        pre, table = self.config.norm_position == "pre", None if self.table is None else ropes[self.table]
        mixed, cache = self.mixer(self.mixer_norm(x_BTD) if pre else x_BTD, places, table, cache)
        x_BTD = x_BTD + self.dropout(mixed) if pre else self.mixer_norm(x_BTD + self.dropout(mixed))
        if self.ffn is not None:
            if pre:
                x_BTD = x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD), places))
            else:
                x_BTD = self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD, places)))
        return x_BTD, cache


def empty_cache(
    kind: str, cfg: config.Model, policy: Policy, batch: int, slots: int, device: torch.device | str = "cpu"
) -> Any:
    """What a block remembers before the first token of `batch` rows of up to `slots` tokens."""
    halves = cfg.halves(kind)
    return MIXERS[halves.mixer_name].empty_cache(halves.mixer, policy, batch, slots, device)
