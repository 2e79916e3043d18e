"""Every attention kernel against the readable one, and that one against plain numpy, in float64.

Shapes: B batch, T length, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops import attention as module
from jaxlm.ops.attention import Places, attention, default_impl

B, H = 2, 4


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def rows_of(kind: str, t: int) -> Places:
    """Positions and segments of two rows: `whole` documents, `packed` ones, or `padded` on both sides."""
    positions, segments = np.tile(np.arange(t), (B, 1)), np.ones((B, t), int)
    if kind != "whole":
        cuts = (t // 3, t // 2)
        for row, cut in enumerate(cuts):
            segments[row, cut:] = 2
            positions[row, cut:] = np.arange(t - cut)
    if kind == "padded":
        segments[0, :3] = segments[0, -2:] = segments[1, -1] = 0
    return Places(jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32))


def arrays(t: int, n: int, k: int) -> list[jax.Array]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((B, t, heads, H))) for heads in (n, k, k, n)]


def in_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, places: Places) -> np.ndarray:
    """One query at a time."""
    positions, segments = map(np.asarray, places)
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = (segments[b] == segments[b, t]) & (positions[b] <= positions[b, t]) & (segments[b, t] != 0)
        if seen.any():
            scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 2), (3, 1)])
def test_xla_is_the_formula(kind: str, n: int, k: int) -> None:
    places, (q, key, v, _) = rows_of(kind, 13), arrays(13, n, k)
    expected = in_numpy(np.asarray(q), np.asarray(key), np.asarray(v), places)
    np.testing.assert_allclose(attention(q, key, v, places, places, impl="xla"), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("t", "block", "most"), [(16, 4, 16), (17, 4, 16), (31, 4, 3), (5, 8, 16)])
def test_blockwise_is_xla(kind: str, n: int, k: int, t: int, block: int, most: int, monkeypatch) -> None:
    """Forward and backward, with equal blocks, a short last block, as many blocks as allowed, and one block."""
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "MAX_BLOCKS", most)
    places, (q, key, v, dout) = rows_of(kind, t), arrays(t, n, k)

    def both(impl: str, places: Places) -> tuple:
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, places, places, impl=impl, aligned=True), q, key, v)
        return out, *vjp(dout)

    results = [jax.jit(both, static_argnums=0)(impl, places) for impl in ("blockwise", "xla")]
    for name, got, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("impl", ["xla", "blockwise"])
def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients(impl: str) -> None:
    places, qkv = rows_of("padded", 16), arrays(16, 4, 2)[:3]
    hidden = np.asarray(places.segments) == 0

    def mixed(*qkv: jax.Array) -> jax.Array:
        return attention(*qkv, places, places, impl=impl, aligned=True)

    np.testing.assert_array_equal(np.asarray(mixed(*qkv))[hidden], 0)
    gradients = jax.grad(lambda *qkv: jnp.sum(mixed(*qkv) ** 2), argnums=(0, 1, 2))(*qkv)
    for gradient in map(np.asarray, gradients):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[hidden], 0)


def test_the_default_is_blockwise_for_long_aligned_rows() -> None:
    q = jnp.zeros((1, 2 * module.BLOCK, 2, H))
    assert default_impl(q, aligned=True) == "blockwise"
    assert default_impl(q[:, 1:], aligned=True) == "xla"
    assert default_impl(q, aligned=False) == "xla"


def test_blockwise_keeps_no_probabilities_for_the_backward_pass() -> None:
    t, places, x = 512, rows_of("whole", 512), arrays(512, 2, 2)[0]
    kept = B * 2 * t * t * x.itemsize // 2  # the probabilities of one layer; half of them are never made

    def temporary_bytes(layers: int) -> int:
        def summed(x: jax.Array) -> jax.Array:
            for _ in range(layers):
                x = attention(x, x, x, places, places, impl="blockwise", aligned=True)
            return jnp.sum(x)

        return jax.jit(jax.grad(summed)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8) - temporary_bytes(4) < kept  # four layers more would keep four times as much


def test_an_unknown_implementation_is_refused() -> None:
    places, (q, k, v, _) = rows_of("whole", 4), arrays(4, 2, 2)
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        attention(q, k, v, places, places, impl="flash", aligned=True)
