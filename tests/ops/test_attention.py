"""Every attention kernel against the readable one, and that one against plain numpy, in float64.

Shapes: B batch, T length, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.attention import blockwise, visible
from jaxlm.ops.attention.attend import attend, attend_first, attend_sinks, attention
from jaxlm.ops.attention.visible import Mixed, Places, merge

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


def in_numpy(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, places: Places, window: int = 1000, softcap: float = 1e9
) -> np.ndarray:
    """One query at a time."""
    positions, segments = map(np.asarray, places)
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = (segments[b] == segments[b, t]) & (positions[b] <= positions[b, t]) & (segments[b, t] != 0)
        seen &= positions[b] > positions[b, t] - window
        if seen.any():
            scores = softcap * np.tanh(k[b, seen, n // group] @ q[b, t, n] / np.sqrt(H) / softcap)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, seen, n // group] / weights.sum()
    return out


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 2), (3, 1)])
def test_xla_is_the_formula(kind: str, n: int, k: int) -> None:
    places, (q, key, v, _) = rows_of(kind, 13), arrays(13, n, k)
    expected = in_numpy(np.asarray(q), np.asarray(key), np.asarray(v), places)
    np.testing.assert_allclose(attention(q, key, v, places, places, impl="xla"), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["xla", "blockwise"])
@pytest.mark.parametrize(("window", "softcap"), [(1, 1e9), (4, 1e9), (13, 1e9), (1000, 0.7), (5, 0.7)])
def test_window_and_soft_cap_are_the_formula(impl: str, window: int, softcap: float) -> None:
    """The window counts the token itself, and the early tokens see themselves."""
    places, (q, key, v, _) = rows_of("padded", 13), arrays(13, 4, 2)
    expected = in_numpy(*map(np.asarray, (q, key, v)), places, window, softcap)
    options = {"window": window, "softcap": softcap if softcap < 1e9 else 0.0}
    got = attention(q, key, v, places, places, impl=impl, aligned=True, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    if window == 1:
        real = np.asarray(places.segments) != 0
        np.testing.assert_allclose(np.asarray(got)[real], np.repeat(v, 2, axis=2)[real], rtol=1e-12)


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("t", "block", "most"), [(16, 4, 16), (17, 4, 16), (31, 4, 3), (5, 8, 16)])
def test_blockwise_is_xla(kind: str, n: int, k: int, t: int, block: int, most: int, monkeypatch) -> None:
    """Forward and backward, with equal blocks, a short last block, as many blocks as allowed, and one block."""
    monkeypatch.setattr(blockwise, "BLOCK", block)
    monkeypatch.setattr(blockwise, "MAX_BLOCKS", most)
    places, (q, key, v, dout) = rows_of(kind, t), arrays(t, n, k)

    def both(impl: str, places: Places) -> tuple:
        out, vjp = jax.vjp(lambda *qkv: attention(*qkv, places, places, impl=impl, aligned=True), q, key, v)
        return out, *vjp(dout)

    results = [jax.jit(both, static_argnums=0)(impl, places) for impl in ("blockwise", "xla")]
    for name, got, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize(("t", "most", "window"), [(17, 16, 5), (31, 3, 5), (31, 2, 9), (16, 16, 1), (15, 16, 40)])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_a_band_of_blocks_is_xla(kind: str, t: int, most: int, window: int, softcap: float, monkeypatch) -> None:
    """Forward and backward, of the values and of the log-sum-exp, in one piece and in several."""
    monkeypatch.setattr(blockwise, "BLOCK", 4)
    monkeypatch.setattr(blockwise, "MAX_BLOCKS", most)
    places, (q, key, v, dout) = rows_of(kind, t), arrays(t, 4, 2)
    real = np.asarray(places.segments) != 0
    dlse = jnp.where(real[..., None], dout[..., 0], 0)

    def both(impl: str) -> tuple:
        def mixed(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            options = {"window": window, "softcap": softcap}
            out, lse = attend(*qkv, places, places, impl=impl, aligned=True, **options)
            return out, jnp.where(real[..., None], lse, 0)

        out, vjp = jax.vjp(mixed, q, key, v)
        return *out, *vjp((dout, dlse))

    results = [jax.jit(both, static_argnums=0)(impl) for impl in ("blockwise", "xla")]
    for name, got, expected in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12, err_msg=name)


def test_the_cost_of_a_window_is_linear_in_the_row() -> None:
    def flops(t: int, window: int) -> float:
        x = jax.ShapeDtypeStruct((1, t, 1, H), jnp.float32)
        places = Places(*[jax.ShapeDtypeStruct((1, t), jnp.int32)] * 2)

        def banded(x: jax.Array, places: Places) -> jax.Array:
            return attention(x, x, x, places, places, impl="blockwise", aligned=True, window=window)

        return jax.jit(banded).lower(x, places).cost_analysis()["flops"]

    assert flops(16384, 256) < 2.2 * flops(8192, 256)
    assert flops(8192, 256) < flops(8192, 0) / 8


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    places, (q, key, v, dout) = rows_of("padded", 21), arrays(21, 4, 2)

    def whole(*qkv: jax.Array) -> jax.Array:
        return attention(*qkv, places, places, impl="xla")

    def merged(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        cut = [(slice(a, b), Places(*(x[:, a:b] for x in places))) for a, b in [(0, 8), (8, 20), (20, 21)]]
        return merge([attend(q, k[:, part], v[:, part], places, held) for part, held in cut], dtype=q.dtype)

    def both(op: Callable) -> tuple:
        out, vjp = jax.vjp(op, q, key, v)
        return out, *vjp(dout)

    results = [jax.jit(both, static_argnums=0)(op) for op in (merged, whole)]
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_a_sink_logit_takes_part_in_the_softmax_and_has_no_value() -> None:
    """In every kernel alike; a head whose logit is -inf has none."""
    places, (q, key, v, _) = rows_of("padded", 16), arrays(16, 4, 4)
    sinks_N = jnp.asarray([0.3, -2.0, 5.0, -jnp.inf])
    scores = np.einsum("btnh,bsnh->btns", q, key) / np.sqrt(H)
    weights = np.exp(scores) * np.asarray(visible.visible(places, places))[:, :, None]
    expected = np.einsum("btns,bsnh->btnh", weights, v) / (weights.sum(-1) + np.exp(sinks_N))[..., None].clip(1e-300)
    for impl in ("xla", "blockwise"):
        out = merge([attend(q, key, v, places, places, impl=impl, aligned=True)], sinks_N, q.dtype)
        np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-13)


def test_sink_tokens_are_keys_of_every_token_and_of_no_padding() -> None:
    places, (q, key, v, _) = rows_of("padded", 16), arrays(16, 4, 2)
    sinks_K, sinks_V = key[0, :3], v[0, 3:6]

    @jax.jit
    def mixed(q: jax.Array) -> jax.Array:
        parts = [attend(q, key, v, places, places), attend_sinks(q, sinks_K, sinks_V, places.segments)]
        return merge(parts, dtype=q.dtype)

    out = mixed(q)
    for row in range(B):
        real = np.asarray(places.segments)[row] != 0
        segments = np.asarray(places.segments)[row][real]
        for number in set(segments.tolist()):
            mine = np.flatnonzero(np.asarray(places.segments)[row] == number)
            joined = [np.concatenate([s, x[row, mine]])[None] for s, x in ((sinks_K, key), (sinks_V, v))]
            alone = Places(*(jnp.asarray(x)[None] for x in (np.arange(3 + len(mine)), np.ones(3 + len(mine), int))))
            query = Places(alone.positions[:, 3:], alone.segments[:, 3:])
            expected = attention(q[row : row + 1, mine], *map(jnp.asarray, joined), query, alone)
            np.testing.assert_allclose(out[row, mine], expected[0], rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(out[row, ~real], 0)


def test_first_tokens_are_seen_once_they_have_left_the_window() -> None:
    places, (q, key, v, _) = rows_of("packed", 31), arrays(31, 4, 2)
    first = jax.jit(functools.partial(attend_first, keep_first=2, window=5))
    out, lse = first(q, key, v, places)
    reach = np.asarray(places.positions)
    assert np.isneginf(lse[reach < 5]).all() and np.isfinite(lse[reach >= 5]).all()
    both = merge([Mixed(out, lse), attend(q, key, v, places, places, window=5)], dtype=q.dtype)
    mask = np.asarray(visible.visible(places, places, 5) | visible.visible(places, places) & (reach < 2)[:, None])
    scores = np.einsum("btnh,bsnh->btns", q, np.repeat(key, 2, axis=2)) / np.sqrt(H)
    weights = np.exp(scores) * mask[:, :, None]
    expected = np.einsum("btns,bsnh->btnh", weights / weights.sum(-1, keepdims=True), np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(both, expected, rtol=1e-12, atol=1e-13)
    cut = Places(*(x[:, 3:] for x in places))  # rows that begin inside a document have nothing to keep of it
    _, lse = first(q[:, 3:], key[:, 3:], v[:, 3:], cut)
    assert np.isneginf(lse[np.asarray(cut.segments) == 1]).all()


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
