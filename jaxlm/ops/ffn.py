"""Feed-forward activations. Computed in the input's dtype, as matrix products are.

`swiglu` joins two projections (Shazeer 2020, equation 6); the others act on one.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def activate(name: str, up: Float[Array, "..."]) -> Float[Array, "..."]:
    """One of the plain activations: `gelu` (exact, erf), `gelu_tanh` (its tanh approximation), `relu`, `silu`."""
    if name == "gelu":
        return jax.nn.gelu(up, approximate=False)
    if name == "gelu_tanh":
        return jax.nn.gelu(up, approximate=True)
    if name == "relu":
        return jax.nn.relu(up)
    if name == "silu":
        return jax.nn.silu(up)
    raise ValueError(f"unknown activation {name!r}")


def swiglu(gate: Float[Array, "... f"], up: Float[Array, "... f"]) -> Float[Array, "... f"]:
    """`silu(gate) * up`."""
    return jax.nn.silu(gate) * up
