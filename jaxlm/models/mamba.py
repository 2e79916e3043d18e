"""The selective state-space mixers: Mamba (Gu & Dao 2023) and Mamba-2 (Dao & Gu 2024).

What a tensor-parallel mesh splits, the channels and the heads, is an axis of its own in every kernel, so no projection
mixes parts that lie on different devices.

Shapes: B batch, T length, D width, F inner channels, P state, R rank of the step size, J taps before the last; N heads
in G groups, H head dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.mesh import constrain
from jaxlm.models.layers import Linear, Norm, logical
from jaxlm.models.sequence_parallel import ROW, over_sequence, repeated, sequence_axis
from jaxlm.numerics import Policy, wide
from jaxlm.ops import norm
from jaxlm.ops.attention.visible import Places
from jaxlm.ops.ffn import swiglu
from jaxlm.ops.ssm import convolution, selective_scan, ssd

INNER, HEADS, STATE = (*ROW, "inner"), (*ROW, "heads", None), (*ROW, "state")
SCANNED = (INNER, INNER, ("inner", "state"), STATE, STATE, ("inner",), ROW)
SCANNED_HEADS = (HEADS, HEADS[:3], ("heads",), HEADS, HEADS, ("heads",), ROW)
"""Logical axes of the arguments of both scans; groups are split like the heads that they serve."""


class MambaCache(NamedTuple):
    """What `Mamba` remembers of a row: its size is that of one token."""

    conv: Float[Array, "*r b j f"]
    """The last inputs of the convolution."""
    state: Float[Array, "*r b p f"]
    """In float32 or wider."""


class Mamba2Cache(NamedTuple):
    """What `Mamba2` remembers of a row: its size is that of one token."""

    conv: Float[Array, "*r b j f"]
    """The last inputs of the convolution of x."""
    bc_conv: Float[Array, "*r b j q"]
    """The last inputs of the convolution of B and C."""
    state: Float[Array, "*r b n h p"]
    """In float32 or wider."""


class Mamba(nn.Module):
    """`out((scan(silu(conv(u))) * silu(z))` with u, z = in(x): section 3.4 and figure 3 of Gu & Dao 2023."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "b t d"], places: Places, rope: None, cache: MambaCache | None
    ) -> tuple[Float[Array, "b t d"], MambaCache | None]:
        cfg, mamba, policy = self.config, self.config.mamba, self.policy
        inner, p, r, width = mamba.expand * cfg.d_model, mamba.d_state, mamba.dt_rank, wide(policy.compute)
        in_proj = _linear(self, "in_proj", (2, inner), ("embed", None, "inner"))
        u_BTF, z_BTF = _pair(in_proj(x_BTD))
        u_BTF = constrain(u_BTF, "batch", "seq", "inner")
        conv = CausalConv(mamba.d_conv, mamba.conv_bias, "inner", policy, name="conv")
        u_BTF, conv_state = conv(u_BTF, places, None if cache is None else cache.conv)

        x_proj = Linear((r + 2 * p,), ("inner", None), std=cfg.init_std, policy=policy, name="x_proj")
        dt_BTR, b_BTP, c_BTP = jnp.split(x_proj(u_BTF), (r, r + p), axis=-1)
        if mamba.inner_norms:
            dt_BTR = Norm("rmsnorm", cfg.norm_eps, policy, axis="state", name="dt_norm")(dt_BTR)
            b_BTP = Norm("rmsnorm", cfg.norm_eps, policy, axis="state", name="b_norm")(b_BTP)
            c_BTP = Norm("rmsnorm", cfg.norm_eps, policy, axis="state", name="c_norm")(c_BTP)
        dt_BTF = StepSize(inner, mamba, policy, name="dt_proj")(dt_BTR)
        log_FP = self.param("A_log", logical(_log_count, "inner", "state"), (inner, p), policy.params)
        skip_F = self.param("D", logical(nn.initializers.ones, "inner"), (inner,), policy.params)
        inputs = (u_BTF, dt_BTF, -jnp.exp(log_FP.astype(width)), b_BTP, c_BTP, skip_F, places.segments)
        scan = functools.partial(selective_scan.selective_scan, chunk=mamba.chunk, impl=mamba.impl)
        if cache is None:
            y_BTF, state = over_sequence(_outputs(scan), SCANNED, INNER)(*inputs), None
        else:
            y_BTF, state = scan(*inputs, cache.state)
        out_proj = _linear(self, "out_proj", (cfg.d_model,), ("inner", "embed"), cfg.residual_std)
        mixed_BTD = out_proj(constrain(swiglu(z_BTF, y_BTF), "batch", "seq", "inner"))
        return mixed_BTD, None if conv_state is None or state is None else MambaCache(conv_state, state)

    @staticmethod
    def empty_cache(cfg: config.Model, policy: Policy, batch: int, slots: int) -> MambaCache:
        """A cache that has seen nothing; `slots` does not matter."""
        mamba, inner = cfg.mamba, cfg.mamba.expand * cfg.d_model
        return MambaCache(
            jnp.zeros((batch, mamba.d_conv - 1, inner), policy.compute),
            jnp.zeros((batch, mamba.d_state, inner), wide(policy.compute)),
        )


class Mamba2(nn.Module):
    """`out(norm(ssd(silu(conv(x, B, C))) * silu(z)))`: section 7 and figure 6 of Dao & Gu 2024."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "b t d"], places: Places, rope: None, cache: Mamba2Cache | None
    ) -> tuple[Float[Array, "b t d"], Mamba2Cache | None]:
        cfg, mamba, policy = self.config, self.config.mamba, self.policy
        (b, t, _), width = x_BTD.shape, wide(policy.compute)
        inner, groups, p = mamba.expand * cfg.d_model, mamba.n_groups, mamba.d_state
        heads = inner // mamba.head_dim
        in_proj = _linear(self, "in_proj", (2, inner), ("embed", None, "inner"))
        z_BTF, x_BTF = _pair(in_proj(x_BTD))
        x_BTF = constrain(x_BTF, "batch", "seq", "inner")
        bc_BTQ = _linear(self, "bc_proj", (2 * groups * p,), ("embed", "state"))(x_BTD)
        conv = CausalConv(mamba.d_conv, mamba.conv_bias, "inner", policy, name="conv")
        bc_conv = CausalConv(mamba.d_conv, mamba.conv_bias, "state", policy, name="bc_conv")
        x_BTF, conv_state = conv(x_BTF, places, None if cache is None else cache.conv)
        bc_BTQ, bc_state = bc_conv(bc_BTQ, places, None if cache is None else cache.bc_conv)
        b_BTGP, c_BTGP = jnp.moveaxis(bc_BTQ.reshape(b, t, 2, groups, p), 2, 0)

        dt_BTN = _linear(self, "dt_proj", (heads,), ("embed", "heads"))(x_BTD)
        bias_N = self.param("dt_bias", logical(_step_bias(mamba), "heads"), (heads,), policy.params)
        log_N = self.param("A_log", logical(_uniform_log, "heads"), (heads,), policy.params)
        skip_N = self.param("D", logical(nn.initializers.ones, "heads"), (heads,), policy.params)
        x_BTNH = x_BTF.reshape(b, t, heads, mamba.head_dim)
        dt_BTN = selective_scan.softplus(dt_BTN.astype(width) + bias_N.astype(width))
        scan = functools.partial(ssd.ssd, chunk=mamba.chunk, impl=mamba.impl)
        if sequence_axis():  # the heads of a device come with their groups
            b_BTGP, c_BTGP = repeated(b_BTGP, 2, "heads"), repeated(c_BTGP, 2, "heads")
        inputs = (x_BTNH, dt_BTN, -jnp.exp(log_N.astype(width)), b_BTGP, c_BTGP, skip_N, places.segments)
        if cache is None:
            y_BTNH, state = over_sequence(_outputs(scan), SCANNED_HEADS, HEADS)(*inputs), None
        else:
            y_BTNH, state = scan(*inputs, cache.state)
        y_BTF = GatedNorm(cfg.norm_eps, groups, policy, name="norm")(y_BTNH.reshape(b, t, inner), z_BTF)
        out_proj = _linear(self, "out_proj", (cfg.d_model,), ("inner", "embed"), cfg.residual_std)
        mixed_BTD = out_proj(constrain(y_BTF, "batch", "seq", "inner"))
        if conv_state is None or bc_state is None or state is None:
            return mixed_BTD, None
        return mixed_BTD, Mamba2Cache(conv_state, bc_state, state)

    @staticmethod
    def empty_cache(cfg: config.Model, policy: Policy, batch: int, slots: int) -> Mamba2Cache:
        """A cache that has seen nothing; `slots` does not matter."""
        mamba, inner = cfg.mamba, cfg.mamba.expand * cfg.d_model
        return Mamba2Cache(
            jnp.zeros((batch, mamba.d_conv - 1, inner), policy.compute),
            jnp.zeros((batch, mamba.d_conv - 1, 2 * mamba.n_groups * mamba.d_state), policy.compute),
            jnp.zeros((batch, inner // mamba.head_dim, mamba.head_dim, mamba.d_state), wide(policy.compute)),
        )


class CausalConv(nn.Module):
    """`silu(conv(x))`: kernel [K, F], its last row for the token itself, and bias [F]."""

    taps: int
    use_bias: bool
    axis: str
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTF: Float[Array, "b t f"], places: Places, state_BJF: Float[Array, "b j f"] | None
    ) -> tuple[Float[Array, "b t f"], Float[Array, "b j f"] | None]:
        shape = (self.taps, x_BTF.shape[-1])
        kernel_KF = self.param("kernel", logical(_uniform(self.taps**-0.5), None, self.axis), shape, self.policy.params)
        zeros = logical(nn.initializers.zeros, self.axis)
        bias_F = self.param("bias", zeros, shape[1:], self.policy.params) if self.use_bias else None
        inputs = (x_BTF, kernel_KF, bias_F, places.segments)
        if state_BJF is not None:
            return convolution.causal_conv(*inputs, state_BJF)
        channels = (self.axis,)
        convolve = over_sequence(
            _outputs(convolution.causal_conv), ((*ROW, *channels), (None, *channels), channels, ROW), (*ROW, *channels)
        )
        return convolve(*inputs), None


class StepSize(nn.Module):
    """`softplus(x @ kernel + bias)` in float32 or wider; at first, steps between `dt_min` and `dt_max`."""

    features: int
    mamba: config.Mamba
    policy: Policy

    @nn.compact
    def __call__(self, dt_BTR: Float[Array, "b t r"]) -> Float[Array, "b t f"]:
        policy, width, rank = self.policy, wide(self.policy.compute), dt_BTR.shape[-1]
        init = logical(_uniform(rank**-0.5), None, "inner")
        kernel_RF = self.param("kernel", init, (rank, self.features), policy.params)
        bias_F = self.param("bias", logical(_step_bias(self.mamba), "inner"), (self.features,), policy.params)
        y_BTF = jnp.dot(dt_BTR.astype(policy.compute), kernel_RF.astype(policy.compute))
        return selective_scan.softplus(y_BTF.astype(width) + bias_F.astype(width))


class GatedNorm(nn.Module):
    """`rms_norm(x * silu(gate))`, over each group of channels for itself."""

    eps: float
    groups: int
    policy: Policy

    @nn.compact
    def __call__(self, x_BTF: Float[Array, "b t f"], gate_BTF: Float[Array, "b t f"]) -> Float[Array, "b t f"]:
        ones = logical(nn.initializers.ones, "inner")
        scale_F = self.param("scale", ones, (x_BTF.shape[-1],), self.policy.params)
        return norm.gated_rms_norm(x_BTF, gate_BTF, scale_F, eps=self.eps, groups=self.groups)


def _outputs(op: Callable[..., tuple[Array, Any]]) -> Callable[..., Array]:
    """The op without the state that it ends with."""
    return lambda *arrays, axis: op(*arrays, axis=axis)[0]


def _linear(
    mixer: Mamba | Mamba2, name: str, features: tuple[int, ...], axes: tuple[str | None, ...], std: float = 0.0
) -> Linear:
    cfg = mixer.config
    std, bias = std or cfg.init_std, cfg.mamba.proj_bias
    return Linear(features, axes, std=std, policy=mixer.policy, use_bias=bias, name=name)


def _pair(x_BT2F: Array) -> tuple[Array, Array]:
    return x_BT2F[..., 0, :], x_BT2F[..., 1, :]


def _uniform(bound: float) -> nn.initializers.Initializer:
    """Evenly between -bound and bound."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _log_count(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """log 1, log 2, ... for each channel (S4D-Real, Gu & Dao 2023, section 3.6)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def _uniform_log(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """The logarithm of what is even between 1 and 16, as the code of Dao & Gu 2024 begins A."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


def _step_bias(mamba: config.Mamba) -> nn.initializers.Initializer:
    """softplus^-1 of steps that are even in the logarithm (Gu & Dao 2023, section 3.6)."""

    def init(key, shape, dtype=jnp.float32, out_sharding=None) -> Array:
        low, high = math.log(mamba.dt_min), math.log(mamba.dt_max)
        step = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), mamba.dt_floor)
        return step + jnp.log(-jnp.expm1(-step))

    return init
