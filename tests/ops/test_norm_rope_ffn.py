"""Norms, positions and activations against numpy in float64; and that half precision is rounded once.

Shapes: B batch, T length, N heads, H head dim, P = H/2 rotated pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import ffn, norm, rope

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 3, 8))
SCALE, BIAS = RANDOM.standard_normal((2, 8))
erf = np.vectorize(math.erf)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
}


def test_rms_norm() -> None:
    with jax.enable_x64(True):
        got = norm.rms_norm(jnp.asarray(X), jnp.asarray(SCALE), eps=0.1)
    np.testing.assert_allclose(got, X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.1) * SCALE, rtol=1e-12)


def test_layer_norm() -> None:
    with jax.enable_x64(True):
        got = norm.layer_norm(jnp.asarray(X), jnp.asarray(SCALE), jnp.asarray(BIAS), eps=0.1)
    centred = X - X.mean(-1, keepdims=True)
    expected = centred / np.sqrt(X.var(-1, keepdims=True) + 0.1) * SCALE + BIAS
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_a_norm_of_bfloat16_is_computed_wide_and_rounded_once() -> None:
    x, scale = jnp.asarray(X, jnp.bfloat16), jnp.asarray(SCALE, jnp.float32)
    expected = norm.rms_norm(x.astype(jnp.float32), scale, eps=1e-5).astype(jnp.bfloat16)
    np.testing.assert_array_equal(norm.rms_norm(x, scale, eps=1e-5), expected)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rope_multiplies_pairs_as_complex_numbers(layout) -> None:
    x_BTNH = RANDOM.standard_normal((2, 5, 3, 8))
    positions_BT = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 900]], np.int32)
    frequencies_P = rope.rope_frequencies(8, 100.0)
    np.testing.assert_allclose(frequencies_P, [100.0 ** (-2 * i / 8) for i in range(4)])
    with jax.enable_x64(True):
        sin_BTP, cos_BTP = rope.rope_table(jnp.asarray(positions_BT), frequencies_P, jnp.float64)
        got = np.asarray(rope.apply_rope(jnp.asarray(x_BTNH), sin_BTP, cos_BTP, layout=layout))
    first, second = (slice(0, 4), slice(4, 8)) if layout == "half" else (slice(0, 8, 2), slice(1, 8, 2))
    turned = (x_BTNH[..., first] + 1j * x_BTNH[..., second]) * np.exp(
        1j * positions_BT[:, :, None, None] * frequencies_P
    )
    np.testing.assert_allclose(got[..., first], turned.real, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got[..., second], turned.imag, rtol=1e-10, atol=1e-12)


def test_sinusoidal_table() -> None:
    table = rope.sinusoidal_table(6, 8)
    np.testing.assert_allclose(table[5, 2], np.sin(5 / 10000 ** (2 / 8)))
    np.testing.assert_allclose(table[5, 3], np.cos(5 / 10000 ** (2 / 8)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    with jax.enable_x64(True):
        np.testing.assert_allclose(ffn.activate(name, jnp.asarray(X)), ACTIVATIONS[name](X), rtol=1e-10, atol=1e-12)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        ffn.activate("tanh", jnp.zeros(3))


def test_swiglu_and_its_gradient() -> None:
    gate, up, dout = RANDOM.standard_normal((3, 4, 8))
    with jax.enable_x64(True):
        out, vjp = jax.vjp(ffn.swiglu, jnp.asarray(gate), jnp.asarray(up))
        dgate, dup = vjp(jnp.asarray(dout))
    s = sigmoid(gate)
    np.testing.assert_allclose(out, gate * s * up, rtol=1e-12)
    np.testing.assert_allclose(dup, dout * gate * s, rtol=1e-12)
    np.testing.assert_allclose(dgate, dout * up * (s + gate * s * (1 - s)), rtol=1e-10)
