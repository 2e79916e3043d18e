"""A block: a token mixer and a channel mixer, each with its norm and residual.

Shapes: B batch, T length, D width.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from jaxlm.config import parse_block
from torch_ref.models.attention import Attention
from torch_ref.models.ffn import MLP
from torch_ref.models.layers import Norm
from torch_ref.numerics import Policy
from torch_ref.ops.attention import Places

MIXERS = {"attention": Attention}
FFNS = {"mlp": MLP}


class Block(nn.Module):
    """Pre-norm `x + f(norm(x))` or post-norm `norm(x + f(x))`, for the mixer and then for the feed-forward."""

    def __init__(self, kind: str, config: config.Model, policy: Policy) -> None:
        super().__init__()
        mixer_name, ffn_name = parse_block(kind)
        self.config = config
        self.mixer = MIXERS[mixer_name](config, policy)
        self.ffn = FFNS[ffn_name](config, policy)
        self.mixer_norm = Norm(config.norm, config.norm_eps, policy, config.d_model)
        self.ffn_norm = Norm(config.norm, config.norm_eps, policy, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BTD: Float[Tensor, "b t d"], places: Places, rope: tuple[Tensor, Tensor] | None, cache: Any
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        if self.config.norm_position == "pre":
            mixed, cache = self.mixer(self.mixer_norm(x_BTD), places, rope, cache)
            x_BTD = x_BTD + self.dropout(mixed)
            x_BTD = x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))
        else:
            mixed, cache = self.mixer(x_BTD, places, rope, cache)
            x_BTD = self.mixer_norm(x_BTD + self.dropout(mixed))
            x_BTD = self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))
        return x_BTD, cache
