"""What a linear map does besides its own product: an adapter beside it, a frozen weight in four bits.

    y = x W + s (x A) B                 LoRA (Hu et al. 2021, eq. 3)
    y = m / |W + s A B| * (x W + s (x A) B)     DoRA (Liu et al. 2024, eq. 5), the norm of each output detached (4.3)

Names and shapes are those of PEFT: `a` [r, in], `b` [out, r], `magnitude` [out]; of a stack of experts E of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from torch_ref.numerics import wide
from torch_ref.ops import quantized


class Adapter(nn.Module):
    """A low-rank update of a linear map, [E,] in and out features."""

    def __init__(
        self, lead: tuple[int, ...], inputs: int, outputs: int, rank: int, scale: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, 0.0
        self.a = nn.Parameter(torch.zeros(*lead, rank, inputs, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(*lead, outputs, rank, dtype=dtype))
        self.magnitude: nn.Parameter | None = None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Nothing: the values come from `lora.load`."""


class FourBits(nn.Module):
    """A frozen weight [out, in] in four bits a value."""

    codes: Tensor
    scales: Tensor
    block_scales: Tensor | None
    offset: Tensor | None

    def __init__(self, weight: Float[Tensor, "o i"], *, double: bool) -> None:
        super().__init__()
        stored = quantized.quantize(weight)
        self.register_buffer("codes", stored.codes)
        eight = quantized.quantize_scales(stored.scales) if double else None
        self.register_buffer("scales", eight.codes if eight else stored.scales)
        self.register_buffer("block_scales", eight.scales if eight else None)
        self.register_buffer("offset", eight.offset if eight else None)

    def weight(self) -> Float32[Tensor, "o i"]:
        """The values that the bits stand for."""
        scales = self.scales
        if self.block_scales is not None and self.offset is not None:
            scales = quantized.dequantize_scales(quantized.Scales8(scales, self.block_scales, self.offset))
        return quantized.dequantize(quantized.NF4(self.codes, scales))


def adapted(
    adapter: Adapter | None, x: Float[Tensor, "... i"], y: Float[Tensor, "... o"], weight: Float[Tensor, "o i"]
) -> Float[Tensor, "... o"]:
    """What a linear map gives with its adapter, if it has one.

    Args:
        x: its input.
        y: what the frozen weight makes of it, without a bias.
        weight: in the compute dtype.
    """
    if adapter is None:
        return y
    compute = weight.dtype
    a, b = adapter.a.to(compute), adapter.b.to(compute)
    x = F.dropout(x, adapter.dropout, training=adapter.training)
    y = y + adapter.scale * F.linear(F.linear(x, a), b)
    if adapter.magnitude is None:
        return y
    norm = column_norm(weight, a, b, adapter.scale)
    return (adapter.magnitude.to(norm.dtype) / norm.detach()).to(compute) * y


def adapted_kernel(adapter: Adapter | None, kernel: Float[Tensor, "e i o"]) -> Float[Tensor, "e i o"]:
    """The kernels of all experts with their adapters."""
    if adapter is None:
        return kernel
    compute = kernel.dtype
    a, b = adapter.a.to(compute), adapter.b.to(compute)
    whole = kernel + adapter.scale * torch.einsum("eri,eor->eio", a, b)
    if adapter.magnitude is None:
        return whole
    width = wide(compute)
    norm_EO = torch.sqrt(torch.sum(torch.square(whole.to(width)), dim=1))
    return whole * (adapter.magnitude.to(width) / norm_EO.detach()).to(compute)[:, None]


def column_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norm over the inputs of each output of `W + s A B`, in float32 or wider."""
    width = wide(weight.dtype)
    whole = weight.to(width) + scale * (b.to(width) @ a.to(width))
    return torch.sqrt(torch.sum(torch.square(whole), dim=1))
