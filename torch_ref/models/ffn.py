"""The dense feed-forward: two matrices around an activation, or three for SwiGLU and its clamped form.

Shapes: B batch, T length, D width, F feed-forward width.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.layers import Linear
from torch_ref.numerics import Policy
from torch_ref.ops import ffn
from torch_ref.ops.attention.attend import Places


class MLP(nn.Module):
    """`down(gated(gate(x), up(x)))` or `down(activate(up(x)))`."""

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config, self.policy = config, policy
        self.up_proj = self._expand()
        if config.gated:
            self.gate_proj = self._expand()
        self.down_proj = Linear(
            (config.d_ff,),
            (config.d_model,),
            std=config.residual_std,
            policy=policy,
            use_bias="mlp" in config.biases,
        )

    def forward(self, x_BTD: Float[Tensor, "b t d"], places: Places | None = None) -> Float[Tensor, "b t d"]:
        up_BTF = self.up_proj(x_BTD)
        if self.config.gated:
            hidden_BTF = ffn.gated(self.config.activation, self.gate_proj(x_BTD), up_BTF)
        else:
            hidden_BTF = ffn.activate(self.config.activation, up_BTF)
        return self.down_proj(hidden_BTF)

    def _expand(self) -> Linear:
        cfg = self.config
        return Linear((cfg.d_model,), (cfg.d_ff,), std=cfg.init_std, policy=self.policy, use_bias="mlp" in cfg.biases)
