"""Feed-forward activations. Computed in the input's dtype, as matrix products are.

`swiglu` joins two projections (Shazeer 2020, equation 6); the others act on one.
"""

from __future__ import annotations

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


def swiglu(gate: Float[Tensor, "... f"], up: Float[Tensor, "... f"]) -> Float[Tensor, "... f"]:
    """`silu(gate) * up`."""
    return F.silu(gate) * up
