"""The parts with parameters of their own: linear maps, embeddings, norms.

Parameters hold no values until `init_params` or `load_state_dict`. A weight is [out, in], its axes flattened: the
transpose of jaxlm's kernel.

Shapes: B batch, T length, D width, V vocabulary; `in` and `out` stand for one or more axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from jaxlm.config.model import Rope
from torch_ref.models.adapter import Adapter, FourBits, adapted
from torch_ref.numerics import Policy, wide
from torch_ref.ops import norm
from torch_ref.ops.rope import rope_frequencies, rope_table, rope_temperature


class Linear(nn.Module):
    """`x @ weight.T (+ bias)` over the axes `inputs` of x, in the compute dtype. Weight [out, in]."""

    def __init__(
        self, inputs: tuple[int, ...], features: tuple[int, ...], std: float, policy: Policy, use_bias: bool = False
    ) -> None:
        super().__init__()
        self.inputs, self.features, self.std, self.policy = inputs, features, std, policy
        self.weight = nn.Parameter(torch.empty(math.prod(features), math.prod(inputs), dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(math.prod(features), dtype=policy.params)) if use_bias else None
        self.adapter: Adapter | None = None
        self.stored: FourBits | None = None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal weight, zero bias."""
        normal_(self.weight, self.std, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        compute = self.policy.compute
        bias = None if self.bias is None else self.bias.to(compute)
        weight = (self.weight if self.stored is None else self.stored.weight()).to(compute)
        x = x.flatten(-len(self.inputs)).to(compute)
        if self.adapter is None:
            return F.linear(x, weight, bias).unflatten(-1, self.features)
        y = adapted(self.adapter, x, F.linear(x, weight), weight)
        return (y if bias is None else y + bias).unflatten(-1, self.features)


class Embed(nn.Module):
    """A table of vectors, weight [rows, D]."""

    def __init__(self, rows: int, d_model: int, std: float, policy: Policy) -> None:
        super().__init__()
        self.std, self.policy = std, policy
        self.weight = nn.Parameter(torch.empty(rows, d_model, dtype=policy.params))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal weight."""
        normal_(self.weight, self.std, generator)

    def forward(self, ids_BT: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        return F.embedding(ids_BT, self.weight).to(self.policy.compute)


class Head(nn.Module):
    """The output matrix of an untied decoder, or of a head that scores: `weight` [V, D] and `bias` [V] or None."""

    def __init__(self, d_model: int, outputs: int, std: float, policy: Policy, use_bias: bool) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(outputs, d_model, dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=policy.params)) if use_bias else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal weight, zero bias."""
        normal_(self.weight, self.std, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Norm(nn.Module):
    """RMS or layer normalisation of the last axis, of `width` elements, by name."""

    def __init__(self, kind: str, eps: float, policy: Policy, width: int) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(width, dtype=policy.params))
        self.bias = nn.Parameter(torch.empty(width, dtype=policy.params)) if kind == "layernorm" else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Weight one, bias zero."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        if self.bias is None:
            return norm.rms_norm(x, self.weight, eps=self.eps)
        return norm.layer_norm(x, self.weight, self.bias, eps=self.eps)


class Rotation(nn.Module):
    """The rotary tables of one `Rope` of the config; its frequencies lie on the module's device."""

    frequencies_P: Tensor

    def __init__(self, rope: Rope, policy: Policy) -> None:
        super().__init__()
        dim, theta, scaling = rope
        self.compute, self.temperature = policy.compute, rope_temperature(scaling)
        frequencies = torch.as_tensor(rope_frequencies(dim, theta, scaling), dtype=wide(policy.compute))
        self.register_buffer("frequencies_P", frequencies, persistent=False)

    def table(self, positions_BT: Int[Tensor, "b t"]) -> tuple[Float[Tensor, "b t p"], Float[Tensor, "b t p"]]:
        """Sine and cosine for these positions."""
        return rope_table(positions_BT, self.frequencies_P, self.compute, self.temperature)


def linear_maps(shapes: Mapping[str, tuple[int, int]], policy: Policy) -> nn.ModuleDict:
    """Linear maps [inputs, outputs] by name that are no part of a decoder; all are zero."""
    maps = nn.ModuleDict({name: Linear((ins,), (outs,), 0.0, policy) for name, (ins, outs) in shapes.items()})
    for weight in maps.parameters():
        nn.init.zeros_(weight)
    return maps


def normal_(parameter: nn.Parameter, std: float, generator: torch.Generator) -> None:
    """Normal values of the generator, which is on the host: the same values on any device."""
    with torch.no_grad():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std)
