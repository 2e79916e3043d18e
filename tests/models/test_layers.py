"""The parts with parameters: what is rounded, and what is not."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models.layers import Linear
from jaxlm.numerics import Policy

TOKENS, D, F = 4096, 16, 24


def test_the_gradient_of_a_bias_is_rounded_once(rng):
    """It is a sum over tokens: rounded at each addition, it would be ten times as wrong as bfloat16 must be."""
    layer = Linear((F,), ("embed", "mlp"), 0.02, Policy(compute=jnp.dtype("bfloat16")), use_bias=True)
    x, dy = jnp.asarray(rng.normal(size=(TOKENS, D)), "bfloat16"), jnp.asarray(rng.normal(size=(TOKENS, F)), "bfloat16")
    params = layer.init(jax.random.key(0), x)["params"]
    _, backward = jax.vjp(lambda params: layer.apply({"params": params}, x), params)
    bias = jax.tree.leaves(backward(dy)[0]["bias"])[0]
    exact = np.asarray(dy, np.float64).sum(0)
    np.testing.assert_array_less(np.abs(bias - exact), 2.0**-8 * np.abs(exact) + 1e-4)
