"""The mixture of experts: a router, stacked feed-forwards of which each token passes a few, and shared ones for all.

Shapes: B batch, T length, D width, F width of one expert, E experts, K experts of one token.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.adapter import Adapter, FourBits, adapted_kernel
from torch_ref.models.ffn import MLP
from torch_ref.models.layers import Linear, normal_
from torch_ref.numerics import Policy, wide
from torch_ref.ops.attention.attend import Places
from torch_ref.ops.moe import experts as moe
from torch_ref.ops.moe import router


class MoE(nn.Module):
    """`sum_k weight_k expert_k(x)`, plus `shared(x)` if there are shared experts. Padding passes no routed expert."""

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config, self.policy = config, policy
        self.router = Router(config, policy)
        self.experts = Experts(config, policy)
        if config.moe.n_shared:
            d_ff = config.moe.n_shared * (config.moe.d_ff or config.d_ff)
            self.shared = MLP(dataclasses.replace(config, d_ff=d_ff), policy)

    def forward(self, x_BTD: Float[Tensor, "b t d"], places: Places) -> Float[Tensor, "b t d"]:
        routing = self.router(x_BTD, places.segments != 0)
        y_BTD = self.experts(x_BTD.to(self.policy.compute), routing)
        return y_BTD + self.shared(x_BTD) if self.config.moe.n_shared else y_BTD


class Router(nn.Module):
    """Scores in float32 or wider: `weight` [E, D], and what the options add: `bias`, `selection_bias`, `noise`.

    `routing` holds the terms of `ops.router.Balance` of the last forward pass; `loss` weights them by the config. In
    training mode, noise comes from torch's generator.
    """

    routing: router.Balance

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config, self.policy, moe = config, policy, config.moe
        self.weight = nn.Parameter(torch.empty(moe.n_experts, config.d_model, dtype=policy.params))
        per_expert = lambda wanted: nn.Parameter(torch.empty(moe.n_experts, dtype=policy.params)) if wanted else None  # noqa: E731
        self.bias = per_expert("router" in config.biases)
        self.selection_bias = per_expert(moe.selection_bias)
        if moe.noisy:
            width = Policy(policy.params, wide(policy.compute))
            self.noise = Linear((config.d_model,), (moe.n_experts,), std=0.0, policy=width)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal weight, zero biases."""
        normal_(self.weight, self.config.init_std, generator)
        for bias in (self.bias, self.selection_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_BTD: Float[Tensor, "b t d"], real_BT: Bool[Tensor, "b t"]) -> router.Routing:
        moe, width = self.config.moe, wide(self.policy.compute)
        logits_BTE = (x_BTD.to(width) @ self.weight.to(width).T).to(width)  # the last cast: see `wide_matmul`
        if self.bias is not None:
            logits_BTE = logits_BTE + self.bias.to(width)
        if moe.noisy and self.training:
            logits_BTE = router.add_noise(logits_BTE, self.noise(x_BTD), torch.randn_like(logits_BTE))
        chosen = router.route(
            logits_BTE,
            None if self.selection_bias is None else self.selection_bias.to(width),
            top_k=moe.top_k,
            router=moe.router,
            renormalize=moe.renormalize,
            scale=moe.route_scale,
            n_groups=moe.n_groups,
            top_groups=moe.top_groups,
        )
        chosen = router.mask_padding(chosen, real_BT)
        kept = router.drop_overflow(chosen, moe.capacity_factor) if moe.capacity_factor else chosen
        self.routing = router.balance(logits_BTE, chosen, kept, real_BT)
        return kept

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The balancing terms of the last forward pass, with their weights."""
        moe, terms = self.config.moe, self.routing
        return moe.balance_loss * terms.balance + moe.importance_loss * terms.importance + moe.z_loss * terms.z


class Experts(nn.Module):
    """The routed feed-forwards, stacked: `gate_proj`, `up_proj` [E, F, D] and `down_proj` [E, D, F]."""

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config = config
        width, d_model = config.moe.d_ff or config.d_ff, config.d_model
        self.gate_proj = self._stack(d_model, width, config.init_std, policy) if config.gated else None
        self.up_proj = self._stack(d_model, width, config.init_std, policy)
        self.down_proj = self._stack(width, d_model, config.residual_std, policy)

    def forward(self, x_BTD: Float[Tensor, "b t d"], routing: router.Routing) -> Float[Tensor, "b t d"]:
        gate, gate_bias = self.gate_proj.weights() if self.gate_proj is not None else (None, None)
        (up, up_bias), (down, down_bias) = self.up_proj.weights(), self.down_proj.weights()
        parameters = moe.Experts(gate, up, down, gate_bias, up_bias, down_bias)
        x_TD, weights_TK, experts_TK = (a.flatten(0, 1) for a in (x_BTD, routing.weights, routing.experts))
        options = {"activation": self.config.activation, "impl": self.config.moe.impl}
        y_TD = moe.moe(x_TD, weights_TK, experts_TK, parameters, **options)
        return y_TD.reshape(x_BTD.shape)

    def _stack(self, inputs: int, features: int, std: float, policy: Policy) -> ExpertLinear:
        return ExpertLinear(self.config.moe.n_experts, inputs, features, std, policy, "experts" in self.config.biases)


class ExpertLinear(nn.Module):
    """The linear maps of all experts, `weight` [E, out, in] and `bias` [E, out] or None; it computes nothing."""

    def __init__(self, n_experts: int, inputs: int, features: int, std: float, policy: Policy, use_bias: bool) -> None:
        super().__init__()
        self.std, self.policy = std, policy
        self.weight = nn.Parameter(torch.empty(n_experts, features, inputs, dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(n_experts, features, dtype=policy.params)) if use_bias else None
        self.adapter: Adapter | None = None
        self.stored: FourBits | None = None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal weight, zero bias."""
        normal_(self.weight, self.std, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def weights(self) -> tuple[Float[Tensor, "e i o"], Float[Tensor, "e o"] | None]:
        """The kernels [E, in, out] of jaxlm and the biases, in the compute dtype."""
        compute = self.policy.compute
        kernel = adapted_kernel(self.adapter, self.weight.transpose(1, 2).to(compute))
        return kernel, None if self.bias is None else self.bias.to(compute)
