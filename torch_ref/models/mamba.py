"""The selective state-space mixers: Mamba (Gu & Dao 2023) and Mamba-2 (Dao & Gu 2024).

Shapes: B batch, T length, D width, F inner channels, P state, R rank of the step size, J taps before the last; N heads
in G groups, H head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.layers import Linear, Norm
from torch_ref.numerics import Policy, wide
from torch_ref.ops import norm
from torch_ref.ops.attention.attend import Places
from torch_ref.ops.ffn import swiglu
from torch_ref.ops.ssm import convolution, selective_scan, ssd


class MambaCache(NamedTuple):
    """What `Mamba` remembers of a row: its size is that of one token."""

    conv: Float[Tensor, "b j f"]
    """The last inputs of the convolution."""
    state: Float[Tensor, "b p f"]
    """In float32 or wider."""


class Mamba2Cache(NamedTuple):
    """What `Mamba2` remembers of a row: its size is that of one token."""

    conv: Float[Tensor, "b j f"]
    """The last inputs of the convolution of x."""
    bc_conv: Float[Tensor, "b j q"]
    """The last inputs of the convolution of B and C."""
    state: Float[Tensor, "b n h p"]
    """In float32 or wider."""


class Mamba(nn.Module):
    """`out((scan(silu(conv(u))) * silu(z))` with u, z = in(x): section 3.4 and figure 3 of Gu & Dao 2023."""

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config, self.policy, mamba = config, policy, config.mamba
        inner, p, r = mamba.expand * config.d_model, mamba.d_state, mamba.dt_rank
        self.in_proj = _linear(config, policy, (config.d_model,), (2, inner))
        self.conv = CausalConv(mamba.d_conv, inner, mamba.conv_bias, policy)
        self.x_proj = Linear((inner,), (r + 2 * p,), std=config.init_std, policy=policy)
        if mamba.inner_norms:
            self.dt_norm = Norm("rmsnorm", config.norm_eps, policy, r)
            self.b_norm = Norm("rmsnorm", config.norm_eps, policy, p)
            self.c_norm = Norm("rmsnorm", config.norm_eps, policy, p)
        self.dt_proj = StepSize(r, inner, mamba, policy)
        self.A_log = nn.Parameter(torch.empty(inner, p, dtype=policy.params))
        self.D = nn.Parameter(torch.empty(inner, dtype=policy.params))
        self.out_proj = _linear(config, policy, (inner,), (config.d_model,), config.residual_std)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A_log: log 1, log 2, ... for each channel (S4D-Real, Gu & Dao 2023, section 3.6); D one."""
        with torch.no_grad():
            self.A_log.copy_(
                torch.arange(1, self.A_log.shape[1] + 1, dtype=self.A_log.dtype).log().expand_as(self.A_log)
            )
            self.D.fill_(1)

    def forward(
        self, x_BTD: Float[Tensor, "b t d"], places: Places, rope: None, cache: MambaCache | None
    ) -> tuple[Float[Tensor, "b t d"], MambaCache | None]:
        mamba, p, r, width = (
            self.config.mamba,
            self.A_log.shape[1],
            self.config.mamba.dt_rank,
            wide(self.policy.compute),
        )
        u_BTF, z_BTF = self.in_proj(x_BTD).unbind(-2)
        u_BTF, conv_state = self.conv(u_BTF, places, None if cache is None else cache.conv)
        dt_BTR, b_BTP, c_BTP = self.x_proj(u_BTF).split((r, p, p), dim=-1)
        if mamba.inner_norms:
            dt_BTR, b_BTP, c_BTP = self.dt_norm(dt_BTR), self.b_norm(b_BTP), self.c_norm(c_BTP)
        y_BTF, state = selective_scan.selective_scan(
            u_BTF,
            self.dt_proj(dt_BTR),
            -torch.exp(self.A_log.to(width)),
            b_BTP,
            c_BTP,
            self.D,
            places.segments,
            None if cache is None else cache.state,
            chunk=mamba.chunk,
            impl=mamba.impl,
        )
        mixed_BTD = self.out_proj(swiglu(z_BTF, y_BTF))
        return mixed_BTD, None if conv_state is None else MambaCache(conv_state, state)

    @staticmethod
    def empty_cache(
        cfg: config.Model, policy: Policy, batch: int, slots: int, device: torch.device | str = "cpu"
    ) -> MambaCache:
        """A cache that has seen nothing; `slots` does not matter."""
        mamba, inner = cfg.mamba, cfg.mamba.expand * cfg.d_model
        return MambaCache(
            torch.zeros(batch, mamba.d_conv - 1, inner, dtype=policy.compute, device=device),
            torch.zeros(batch, mamba.d_state, inner, dtype=wide(policy.compute), device=device),
        )


class Mamba2(nn.Module):
    """`out(norm(ssd(silu(conv(x, B, C))) * silu(z)))`: section 7 and figure 6 of Dao & Gu 2024."""

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config, self.policy, mamba = config, policy, config.mamba
        inner, bc = mamba.expand * config.d_model, 2 * mamba.n_groups * mamba.d_state
        self.heads = inner // mamba.head_dim
        self.in_proj = _linear(config, policy, (config.d_model,), (2, inner))
        self.bc_proj = _linear(config, policy, (config.d_model,), (bc,))
        self.conv = CausalConv(mamba.d_conv, inner, mamba.conv_bias, policy)
        self.bc_conv = CausalConv(mamba.d_conv, bc, mamba.conv_bias, policy)
        self.dt_proj = _linear(config, policy, (config.d_model,), (self.heads,))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=policy.params))
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=policy.params))
        self.D = nn.Parameter(torch.empty(self.heads, dtype=policy.params))
        self.norm = GatedNorm(config.norm_eps, mamba.n_groups, policy, inner)
        self.out_proj = _linear(config, policy, (inner,), (config.d_model,), config.residual_std)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """A even between 1 and 16, as in the code of Dao & Gu 2024; D one; step sizes as `StepSize`."""
        with torch.no_grad():
            self.A_log.copy_(_evenly(self.A_log, 1.0, 16.0, generator).log())
            self.D.fill_(1)
        _step_bias(self.dt_bias, self.config.mamba, generator)

    def forward(
        self, x_BTD: Float[Tensor, "b t d"], places: Places, rope: None, cache: Mamba2Cache | None
    ) -> tuple[Float[Tensor, "b t d"], Mamba2Cache | None]:
        mamba, width = self.config.mamba, wide(self.policy.compute)
        z_BTF, x_BTF = self.in_proj(x_BTD).unbind(-2)
        bc_BTQ = self.bc_proj(x_BTD)
        x_BTF, conv_state = self.conv(x_BTF, places, None if cache is None else cache.conv)
        bc_BTQ, bc_state = self.bc_conv(bc_BTQ, places, None if cache is None else cache.bc_conv)
        b_BTGP, c_BTGP = bc_BTQ.unflatten(-1, (2, mamba.n_groups, mamba.d_state)).unbind(2)
        y_BTNH, state = ssd.ssd(
            x_BTF.unflatten(-1, (self.heads, mamba.head_dim)),
            selective_scan.softplus(self.dt_proj(x_BTD).to(width) + self.dt_bias.to(width)),
            -torch.exp(self.A_log.to(width)),
            b_BTGP,
            c_BTGP,
            self.D,
            places.segments,
            None if cache is None else cache.state,
            chunk=mamba.chunk,
            impl=mamba.impl,
        )
        mixed_BTD = self.out_proj(self.norm(y_BTNH.flatten(-2), z_BTF))
        if conv_state is None or bc_state is None:
            return mixed_BTD, None
        return mixed_BTD, Mamba2Cache(conv_state, bc_state, state)

    @staticmethod
    def empty_cache(
        cfg: config.Model, policy: Policy, batch: int, slots: int, device: torch.device | str = "cpu"
    ) -> Mamba2Cache:
        """A cache that has seen nothing; `slots` does not matter."""
        mamba, inner, bc = cfg.mamba, cfg.mamba.expand * cfg.d_model, 2 * cfg.mamba.n_groups * cfg.mamba.d_state
        state = (batch, inner // mamba.head_dim, mamba.head_dim, mamba.d_state)
        return Mamba2Cache(
            torch.zeros(batch, mamba.d_conv - 1, inner, dtype=policy.compute, device=device),
            torch.zeros(batch, mamba.d_conv - 1, bc, dtype=policy.compute, device=device),
            torch.zeros(state, dtype=wide(policy.compute), device=device),
        )


class CausalConv(nn.Module):
    """`silu(conv(x))`: weight [F, K], its last column for the token itself, and bias [F]."""

    def __init__(self, taps: int, features: int, use_bias: bool, policy: Policy) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, taps, dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(features, dtype=policy.params)) if use_bias else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight even within 1 / sqrt(K), bias zero."""
        bound = self.weight.shape[1] ** -0.5
        with torch.no_grad():
            self.weight.copy_(_evenly(self.weight, -bound, bound, generator))
            if self.bias is not None:
                self.bias.zero_()

    def forward(
        self, x_BTF: Float[Tensor, "b t f"], places: Places, state_BJF: Float[Tensor, "b j f"] | None
    ) -> tuple[Float[Tensor, "b t f"], Float[Tensor, "b j f"] | None]:
        return convolution.causal_conv(x_BTF, self.weight.T, self.bias, places.segments, state_BJF)


class StepSize(nn.Module):
    """`softplus(x @ weight.T + bias)` in float32 or wider; at first, steps between `dt_min` and `dt_max`."""

    def __init__(self, rank: int, features: int, mamba: config.Mamba, policy: Policy) -> None:
        super().__init__()
        self.mamba, self.policy = mamba, policy
        self.weight = nn.Parameter(torch.empty(features, rank, dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(features, dtype=policy.params))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight even within 1 / sqrt(R); bias so that steps are even in the logarithm."""
        bound = self.weight.shape[1] ** -0.5
        with torch.no_grad():
            self.weight.copy_(_evenly(self.weight, -bound, bound, generator))
        _step_bias(self.bias, self.mamba, generator)

    def forward(self, dt_BTR: Float[Tensor, "b t r"]) -> Float[Tensor, "b t f"]:
        compute, width = self.policy.compute, wide(self.policy.compute)
        y_BTF = F.linear(dt_BTR.to(compute), self.weight.to(compute))
        return selective_scan.softplus(y_BTF.to(width) + self.bias.to(width))


class GatedNorm(nn.Module):
    """`rms_norm(x * silu(gate))`, over each group of channels for itself."""

    def __init__(self, eps: float, groups: int, policy: Policy, width: int) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = nn.Parameter(torch.empty(width, dtype=policy.params))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, x_BTF: Float[Tensor, "b t f"], gate_BTF: Float[Tensor, "b t f"]) -> Float[Tensor, "b t f"]:
        return norm.gated_rms_norm(x_BTF, gate_BTF, self.weight, eps=self.eps, groups=self.groups)


def _linear(
    cfg: config.Model, policy: Policy, inputs: tuple[int, ...], features: tuple[int, ...], std: float = 0.0
) -> Linear:
    return Linear(inputs, features, std=std or cfg.init_std, policy=policy, use_bias=cfg.mamba.proj_bias)


def _evenly(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Even random values of the generator, which is on the host, in the shape of `like`."""
    return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)


def _step_bias(bias: nn.Parameter, mamba: config.Mamba, generator: torch.Generator) -> None:
    """softplus^-1 of steps that are even in the logarithm (Gu & Dao 2023, section 3.6)."""
    low, high = math.log(mamba.dt_min), math.log(mamba.dt_max)
    with torch.no_grad():
        step = _evenly(bias, low, high, generator).exp().clamp(min=mamba.dt_floor)
        bias.copy_(step + torch.log(-torch.expm1(-step)))
