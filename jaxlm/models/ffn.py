"""The dense feed-forward: two matrices around an activation, or three for SwiGLU and its clamped form.

Shapes: B batch, T length, D width, F feed-forward width, G = 2F.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.mesh import constrain
from jaxlm.models.layers import Linear
from jaxlm.numerics import Policy
from jaxlm.ops import ffn
from jaxlm.ops.attention.visible import Places

GATE_UP = "gate_up_proj"
"""The two maps in as one, where decoding has joined them: `infer.engine.on_jax.joined`."""


class MLP(nn.Module):
    """`down(gated(gate(x), up(x)))` or `down(activate(up(x)))`."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "b t d"], places: Places | None = None) -> Float[Array, "b t d"]:
        cfg = self.config
        if self.has_variable("params", GATE_UP):
            both_BTG = self._expand(GATE_UP, 2 * cfg.d_ff)(x_BTD)
            hidden_BTF = ffn.gated(cfg.activation, both_BTG[..., : cfg.d_ff], both_BTG[..., cfg.d_ff :])
        elif cfg.gated:
            up_BTF = self._expand("up_proj", cfg.d_ff)(x_BTD)
            hidden_BTF = ffn.gated(cfg.activation, self._expand("gate_proj", cfg.d_ff)(x_BTD), up_BTF)
        else:
            hidden_BTF = ffn.activate(cfg.activation, self._expand("up_proj", cfg.d_ff)(x_BTD))
        hidden_BTF = constrain(hidden_BTF, "batch", "seq", "mlp")
        down_proj = Linear(
            (cfg.d_model,),
            ("mlp", "embed"),
            std=cfg.residual_std,
            policy=self.policy,
            use_bias="mlp" in cfg.biases,
            name="down_proj",
        )
        return down_proj(hidden_BTF)

    def _expand(self, name: str, width: int) -> Linear:
        cfg = self.config
        return Linear(
            (width,), ("embed", "mlp"), std=cfg.init_std, policy=self.policy, use_bias="mlp" in cfg.biases, name=name
        )
