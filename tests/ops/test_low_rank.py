"""The gradient of an adapter's product, against the one that JAX derives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.low_rank import low_rank


def plain(x, a, b):
    return jnp.tensordot(jnp.tensordot(x, a, axes=a.ndim - 1), b, axes=1)


@pytest.mark.parametrize(
    ("tokens", "ins", "outs"), [((10,), (6,), (5,)), ((2, 5), (3, 4), (6,)), ((2, 5), (6,), (3, 4))], ids=str
)
def test_value_and_gradients(tokens, ins, outs):
    draw, shapes = np.random.default_rng(0).normal, ((*tokens, *ins), (*ins, 2), (2, *outs), (*tokens, *outs))
    with jax.enable_x64(True):
        x, a, b, dy = (jnp.asarray(draw(size=shape)) for shape in shapes)
        ours, theirs = jax.vjp(low_rank, x, a, b), jax.vjp(plain, x, a, b)
        np.testing.assert_array_equal(ours[0], theirs[0])
        for found, expected in zip(ours[1](dy), theirs[1](dy), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradients_have_the_precision_of_the_product():
    """All six products, two of the value and four of the gradients, asked for where another precision is usual."""
    x, a, b, dy = (jnp.ones(shape) for shape in ((4, 3), (3, 2), (2, 5), (4, 5)))

    def gradients(x, a, b, dy):
        with jax.default_matmul_precision("highest"):
            _, backward = jax.vjp(low_rank, x, a, b)
        return backward(dy)

    with jax.default_matmul_precision("default"):
        program = str(jax.make_jaxpr(gradients)(x, a, b, dy))
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == program.count("dot_general[") == 6
