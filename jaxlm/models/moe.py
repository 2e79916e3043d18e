"""The mixture of experts: a router, stacked feed-forwards of which each token passes a few, and shared ones for all.

Shapes: B batch, T length, D width, F width of one expert, E experts, K experts of one token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxlm import config
from jaxlm.mesh import Layout, platform, split_layout
from jaxlm.models import adapted
from jaxlm.models.ffn import MLP
from jaxlm.models.layers import Linear, logical
from jaxlm.numerics import Policy, wide
from jaxlm.ops.attention.visible import Places
from jaxlm.ops.moe import exchange, router
from jaxlm.ops.moe import experts as moe

SPLIT_AXES = {
    "gate": ("experts", None, "mlp"),
    "up": ("experts", None, "mlp"),
    "down": ("experts", "mlp", None),
    "gate_bias": ("experts", "mlp"),
    "up_bias": ("experts", "mlp"),
    "down_bias": ("experts", None),
}
"""How the experts' weights are split while they compute: the residual stream is whole."""


class MoE(nn.Module):
    """`sum_k weight_k expert_k(x)`, plus `shared(x)` if there are shared experts. Padding passes no routed expert."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "b t d"], places: Places) -> Float[Array, "b t d"]:
        cfg = self.config
        routing = Router(cfg, self.policy, name="router")(x_BTD, places.segments != 0)
        y_BTD = Experts(cfg, self.policy, name="experts")(x_BTD.astype(self.policy.compute), routing)
        if cfg.moe.n_shared:
            shared = dataclasses.replace(cfg, d_ff=cfg.moe.n_shared * (cfg.moe.d_ff or cfg.d_ff))
            y_BTD = y_BTD + MLP(shared, self.policy, name="shared")(x_BTD)
        return y_BTD


class Router(nn.Module):
    """Scores in float32 or wider: `kernel` [D, E], and what the options add: `bias`, `selection_bias`, `noise`.

    Where the collection `routing` is mutable, it receives the terms of `ops.router.Balance` and `loss`, their sum with
    the weights of the config. While training, noise comes from the rng `dropout`.
    """

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "b t d"], real_BT: Bool[Array, "b t"]) -> router.Routing:
        cfg, moe, params = self.config, self.config.moe, self.policy.params
        width = wide(self.policy.compute)
        normal = logical(nn.initializers.normal(cfg.init_std), "embed", None)
        kernel_DE = self.param("kernel", normal, (cfg.d_model, moe.n_experts), params)
        per_expert = logical(nn.initializers.zeros, None), (moe.n_experts,), params
        logits_BTE = jnp.matmul(x_BTD.astype(width), kernel_DE.astype(width), precision=jax.lax.Precision.HIGHEST)
        if "router" in cfg.biases:
            logits_BTE = logits_BTE + self.param("bias", *per_expert).astype(width)
        if moe.noisy:
            policy = Policy(params, width)
            noise_BTE = Linear((moe.n_experts,), ("embed", None), std=0.0, policy=policy, name="noise")(x_BTD)
            if self.has_rng("dropout"):
                normal_BTE = jax.random.normal(self.make_rng("dropout"), logits_BTE.shape, width)
                logits_BTE = router.add_noise(logits_BTE, noise_BTE, normal_BTE)
        bias_E = self.param("selection_bias", *per_expert).astype(width) if moe.selection_bias else None
        chosen = router.route(
            logits_BTE,
            bias_E,
            top_k=moe.top_k,
            router=moe.router,
            renormalize=moe.renormalize,
            scale=moe.route_scale,
            n_groups=moe.n_groups,
            top_groups=moe.top_groups,
        )
        chosen = router.mask_padding(chosen, real_BT)
        kept = router.drop_overflow(chosen, moe.capacity_factor) if moe.capacity_factor else chosen
        if self.is_mutable_collection("routing"):
            self._tell(router.balance(logits_BTE, chosen, kept, real_BT))
        return kept

    def _tell(self, terms: router.Balance) -> None:
        moe = self.config.moe
        loss = moe.balance_loss * terms.balance + moe.importance_loss * terms.importance + moe.z_loss * terms.z
        for name, value in {**terms._asdict(), "loss": loss}.items():
            self.sow("routing", name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


class Experts(nn.Module):
    """The routed feed-forwards, stacked: `gate_proj`, `up_proj` [E, D, F] and `down_proj` [E, F, D]."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "b t d"], routing: router.Routing) -> Float[Array, "b t d"]:
        cfg = self.config
        width, d_model = cfg.moe.d_ff or cfg.d_ff, cfg.d_model
        gate, gate_bias = self._stack("gate_proj", d_model, width) if cfg.gated else (None, None)
        up, up_bias = self._stack("up_proj", d_model, width)
        down, down_bias = self._stack("down_proj", width, d_model)
        parameters = moe.Experts(gate, up, down, gate_bias, up_bias, down_bias)
        impl = "auto" if self.is_initializing() else cfg.moe.impl  # nothing is computed then
        compute = functools.partial(moe.moe, activation=cfg.activation, impl=impl, platform=platform())
        layout = split_layout()
        if layout is not None:
            return _split_moe(layout, x_BTD, routing, parameters, cfg.moe, compute)
        x_TD, weights_TK, experts_TK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, routing.weights, routing.experts))
        return compute(x_TD, weights_TK, experts_TK, parameters).reshape(x_BTD.shape)

    def _stack(self, name: str, inputs: int, features: int) -> tuple[Array, Array | None]:
        down = name == "down_proj"
        axes = ("mlp", "embed") if down else ("embed", "mlp")
        std = self.config.residual_std if down else self.config.init_std
        shape = (self.config.moe.n_experts, inputs, features)
        return ExpertLinear(shape, axes, std, self.policy, "experts" in self.config.biases, name=name).weights()


class ExpertLinear(nn.Module):
    """The linear maps of all experts, `kernel` [E, in, out] and `bias` [E, out] or None; it computes nothing."""

    shape: tuple[int, int, int]
    axes: tuple[str, str]
    std: float
    policy: Policy
    use_bias: bool

    @nn.compact
    def weights(self) -> tuple[Float[Array, "e i o"], Float[Array, "e o"] | None]:
        """Kernel and bias, in the compute dtype."""
        params, compute = self.policy.params, self.policy.compute
        normal = logical(nn.initializers.normal(self.std), "experts", *self.axes)
        kernel = self.param("kernel", normal, self.shape, params).astype(compute)
        kernel = adapted.adapted_kernel(self, kernel, compute=compute)
        if not self.use_bias:
            return kernel, None
        zeros = logical(nn.initializers.zeros, "experts", self.axes[1])
        return kernel, self.param("bias", zeros, (self.shape[0], self.shape[2]), params).astype(compute)


def _split_moe(
    layout: Layout, x_BTD: Array, routing: router.Routing, parameters: moe.Experts, cfg: config.MoE, compute: Any
) -> Array:
    """Each device computes its own experts, or its part F of them, for the tokens of all devices that share them.

    Along the axes of the experts that split the tokens too, tokens are exchanged; along the others every device has
    the tokens already, and what the devices compute is added.
    """
    along, across, tokens = layout.along("experts"), layout.along("mlp"), layout.along("batch") + layout.along("seq")
    across = tuple(axis for axis in across if axis not in tokens)
    summed = (*across, *(axis for axis in along if axis not in tokens))
    send = _exchange(layout, tuple(axis for axis in along if axis in tokens), cfg)
    placed = {"experts": along, "mlp": across, None: None}
    named = {name: leaf for name, leaf in parameters._asdict().items() if leaf is not None}
    weights = {name: PartitionSpec(*(placed[axis] for axis in SPLIT_AXES[name])) for name in named}
    rows = layout.spec(("batch", "seq", None))

    def local(x_BTD: Array, weights_BTK: Array, experts_BTK: Array, named: dict[str, Array]) -> Array:
        parameters = moe.Experts(**{"gate": None, **named})
        if parameters.down_bias is not None:  # it is added once, not by every device that has a part of F
            first = jax.lax.axis_index(across) == 0
            parameters = parameters._replace(down_bias=jnp.where(first, parameters.down_bias, 0))
        x_TD, weights_TK, experts_TK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTK, experts_BTK))
        n_local = parameters.up.shape[0]
        experts_TK = _within_reach(experts_TK, n_local, {axis: layout.mesh.shape[axis] for axis in along}, tokens)
        y_TD = send(compute, x_TD, weights_TK, experts_TK, parameters, n_local=n_local)
        return jax.lax.psum(y_TD, summed).reshape(x_BTD.shape)

    run = jax.shard_map(local, mesh=layout.mesh, in_specs=(rows, rows, rows, weights), out_specs=rows, check_vma=False)
    return run(x_BTD, routing.weights, routing.experts, named)


def _exchange(layout: Layout, axis: tuple[str, ...], cfg: config.MoE) -> Any:
    """How tokens reach the devices along `axis`: an exchange of `ops.exchange`, or none for one device."""
    devices = math.prod(layout.mesh.shape[one] for one in axis)
    if devices == 1:
        return lambda compute, x, weights, experts, parameters, n_local: compute(x, weights, experts, parameters)
    if cfg.exchange == "gather" or (cfg.exchange == "auto" and cfg.top_k > devices):
        return functools.partial(exchange.gather, axis=axis)
    return functools.partial(exchange.all_to_all, axis=axis, together=layout.mesh.axis_names)


def _within_reach(experts_TK: Array, n_local: int, sizes: Mapping[str, int], tokens: tuple[str, ...]) -> Array:
    """Experts numbered along those axes of theirs that split the tokens; none, where another device computes them.

    Args:
        sizes: of all axes that split the experts, `n_local` on each device.
        tokens: the axes that split the tokens.
    """
    device, reachable, number, devices = experts_TK // n_local, True, 0, 1
    for axis, size in reversed(list(sizes.items())):
        device, place = jnp.divmod(device, size)
        if axis in tokens:
            number, devices = number + place * devices, devices * size
        else:
            reachable = reachable & (place == jax.lax.axis_index(axis))
    reachable = reachable & (device == 0)  # it is not 0 for assignments that are not carried out
    return jnp.where(reachable, number * n_local + experts_TK % n_local, devices * n_local)
