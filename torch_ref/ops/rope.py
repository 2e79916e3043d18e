"""Positions: rotary (Su et al. 2021) and sinusoidal (Vaswani et al. 2017).

Shapes: B batch, T length, N heads, H head dim, P = H/2 rotated pairs, D width.
Frequencies are float64 constants made on the host, so both frameworks start from the same bits.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.numerics import wide


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """Angular frequency of each pair, `theta^(-2i/H)`, radians per token, float64 [P] (section 3.2.2)."""
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def rope_table(
    positions_BT: Int[Tensor, "b t"], frequencies_P: np.ndarray | Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Float[Tensor, "b t p"], Float[Tensor, "b t p"]]:
    """Sine and cosine of every angle `position * frequency`, in `wide(dtype)`."""
    width = wide(dtype)
    # Rounded on the host: not every device has float64.
    angles_BTP = positions_BT[..., None].to(width) * torch.as_tensor(frequencies_P, dtype=width).to(positions_BT.device)
    return torch.sin(angles_BTP), torch.cos(angles_BTP)


def apply_rope(
    x_BTNH: Float[Tensor, "b t n h"],
    sin_BTP: Float[Tensor, "b t p"],
    cos_BTP: Float[Tensor, "b t p"],
    *,
    layout: Literal["half", "interleaved"],
) -> Float[Tensor, "b t n h"]:
    """Rotate each pair of each head by its angle (equation 34): `(a, b) -> (a cos - b sin, b cos + a sin)`.

    `half` pairs element i with i + H/2, `interleaved` pairs 2i with 2i + 1. Computed wide, rounded once.
    """
    sin, cos = sin_BTP[:, :, None, :], cos_BTP[:, :, None, :]
    x = x_BTNH.to(sin.dtype)
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).reshape(x.shape)
    return rotated.to(x_BTNH.dtype)


def sinusoidal_table(max_len: int, d_model: int) -> np.ndarray:
    """Fixed positions, float64 [max_len, D] (section 3.5): even columns are sines, odd columns cosines."""
    angles = np.arange(max_len)[:, None] * 10000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(max_len, -1)[:, :d_model]
