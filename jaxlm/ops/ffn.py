"""Feed-forward activations. Computed in the input's dtype, as matrix products are.

`swiglu` joins two projections (Shazeer 2020, equation 6), as does its clamped form; the others act on one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.typed_jax import custom_vjp


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


def gated(name: str, gate: Float[Array, "... f"], up: Float[Array, "... f"]) -> Float[Array, "... f"]:
    """One of the activations of two projections: `swiglu` or `swiglu_clamped`."""
    return {"swiglu": swiglu, "swiglu_clamped": swiglu_clamped}[name](gate, up)


@custom_vjp()
def swiglu(gate: Float[Array, "... f"], up: Float[Array, "... f"]) -> Float[Array, "... f"]:
    """`silu(gate) * up`. Only the inputs are kept for the backward pass."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(inputs: tuple[Array, Array], dout: Array) -> tuple[Array, Array]:
    gate, up = inputs
    sigmoid = jax.nn.sigmoid(gate)
    # silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g). Written by hand because JAX would keep intermediate arrays of
    # the hidden width, where the two inputs are enough.
    return dout * up * (sigmoid * (1 + gate * (1 - sigmoid))), dout * gate * sigmoid


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def swiglu_clamped(
    gate: Float[Array, "... f"], up: Float[Array, "... f"], alpha: float = 1.702, limit: float = 7.0
) -> Float[Array, "... f"]:
    """`gate sigmoid(alpha gate) (up + 1)` with gate at most `limit` and up within it (gpt-oss, OpenAI 2025)."""
    gate = jnp.where(gate > limit, limit, gate)  # the gradient at the limit is 1, as of torch's clamp
    up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)
