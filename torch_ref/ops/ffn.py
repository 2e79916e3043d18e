"""Feed-forward activations. Computed in the input's dtype, as matrix products are.

`swiglu` joins two projections (Shazeer 2020, equation 6), as does its clamped form; the others act on one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def activate(name: str, up: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """One of the plain activations: `gelu` (exact, erf), `gelu_tanh` (its tanh approximation), `relu`, `silu`."""
    if name == "gelu":
        return F.gelu(up, approximate="none")
    if name == "gelu_tanh":
        return F.gelu(up, approximate="tanh")
    if name == "relu":
        return F.relu(up)
    if name == "silu":
        return F.silu(up)
    raise ValueError(f"unknown activation {name!r}")


def gated(name: str, gate: Float[Tensor, "... f"], up: Float[Tensor, "... f"]) -> Float[Tensor, "... f"]:
    """One of the activations of two projections: `swiglu` or `swiglu_clamped`."""
    return {"swiglu": swiglu, "swiglu_clamped": swiglu_clamped}[name](gate, up)


def swiglu(gate: Float[Tensor, "... f"], up: Float[Tensor, "... f"]) -> Float[Tensor, "... f"]:
    """`silu(gate) * up`."""
    return F.silu(gate) * up


def swiglu_clamped(
    gate: Float[Tensor, "... f"], up: Float[Tensor, "... f"], alpha: float = 1.702, limit: float = 7.0
) -> Float[Tensor, "... f"]:
    """`gate sigmoid(alpha gate) (up + 1)` with gate at most `limit` and up within it (gpt-oss, OpenAI 2025)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
