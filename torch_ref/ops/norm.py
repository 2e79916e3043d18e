"""Normalisation over the last axis.

Statistics, scaling and shift are computed in float32 (float64 for float64 input); the result is rounded once, to the
input's dtype. Shapes: `...` any leading axes, D normalised width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from torch_ref.numerics import wide


def rms_norm(x: Float[Tensor, "... d"], scale_D: Float[Tensor, " d"], *, eps: float) -> Float[Tensor, "... d"]:
    """Root-mean-square normalisation (Zhang & Sennrich 2019, equation 4): `x / sqrt(mean(x^2) + eps) * scale`."""
    w = x.to(wide(x.dtype))
    w = w * torch.rsqrt(torch.mean(w * w, dim=-1, keepdim=True) + eps)
    return (w * scale_D).to(x.dtype)


def gated_rms_norm(
    x: Float[Tensor, "... d"],
    gate: Float[Tensor, "... d"],
    scale_D: Float[Tensor, " d"],
    *,
    eps: float,
    groups: int,
) -> Float[Tensor, "... d"]:
    """`rms_norm(x * silu(gate))` over each of `groups` equal parts of the last axis (Dao & Gu 2024, section 7.1)."""
    width = wide(x.dtype)
    w = x.to(width) * F.silu(gate.to(width))
    parts = w.unflatten(-1, (groups, -1))
    parts = parts * torch.rsqrt(torch.mean(parts * parts, dim=-1, keepdim=True) + eps)
    return (parts.flatten(-2) * scale_D).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "... d"], scale_D: Float[Tensor, " d"], bias_D: Float[Tensor, " d"], *, eps: float
) -> Float[Tensor, "... d"]:
    """Layer normalisation (Ba et al. 2016): `(x - mean) / sqrt(variance + eps) * scale + bias`, biased variance."""
    w = x.to(wide(x.dtype))
    w = w - torch.mean(w, dim=-1, keepdim=True)
    w = w * torch.rsqrt(torch.mean(w * w, dim=-1, keepdim=True) + eps)
    return (w * scale_D + bias_D).to(x.dtype)
