"""The attention kernel of TPUs, interpreted on the CPU, against the readable one: float32, forward and backward."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy
from jaxlm.ops.attention import kernels, splash
from jaxlm.ops.attention.attend import attend, attention
from jaxlm.ops.attention.visible import Places, merge, visible


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may run on a CPU."""
    kernel = kernels.KERNELS["splash"]
    monkeypatch.setitem(kernels.KERNELS, "splash", kernel._replace(platforms=("tpu", "cpu")))


def packed(lengths: list[int], padding: list[int]) -> Places:
    """A row of documents, with padding before each and, last, after them."""
    positions, segments = [], []
    for number, (before, length) in enumerate(zip(padding, [*lengths, 0], strict=True), 1):
        positions += [*[0] * before, *range(length)]
        segments += [*[0] * before, *[number] * length]
    return Places(jnp.asarray([positions], jnp.int32), jnp.asarray([segments], jnp.int32))


def rows(batch: int, t: int) -> Places:
    """Rows of two documents each, cut at different places, with padding around and between them."""
    cuts = [t // 3 + row * t // (3 * batch) for row in range(batch)]
    each = [packed([cut, t - cut - 3 - row % 2 - row], [row % 2, 3, row]) for row, cut in enumerate(cuts)]
    return Places(*(jnp.concatenate(parts) for parts in zip(*each, strict=True)))


def errors(
    batch: int, t: int, n: int, k: int, h: int, layout: Layout | None = None, **options: Any
) -> dict[str, float]:
    """Relative norms of the differences from `xla`: of the output and of each gradient."""
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.standard_normal((batch, t, heads, h)), jnp.float32) for heads in (n, k, k, n)]
    *qkv, dout = arrays
    sinks = jnp.asarray(random.standard_normal(n) + 1, jnp.float32) if options.pop("sinks", False) else None
    places = rows(batch, t)

    def both(impl: str) -> Any:
        def mixed(*arrays: jax.Array | None) -> jax.Array:
            *qkv, sinks = arrays
            if sinks is None:
                return attention(*qkv, places, places, impl=impl, aligned=True, **options)
            if impl == "splash":
                return splash.splash(*qkv, places.segments, sink_logits_N=sinks, **options)
            return merge([attend(*qkv, places, places, impl=impl, **options)], sinks)

        out, vjp = jax.vjp(mixed, *qkv, sinks)
        return out, *vjp(dout)

    traced = jax.jit(both, static_argnums=0)
    expected = traced("xla")
    if layout is None:
        got = traced("splash")
    else:
        with layout.active():
            got = traced("splash")
    pairs = [pair for pair in zip(("out", "q", "k", "v", "sinks"), got, expected, strict=True) if pair[1] is not None]
    hidden = np.asarray(places.segments) == 0
    for name, array, _ in pairs[:4]:
        np.testing.assert_array_equal(np.asarray(array)[hidden], 0, err_msg=name)
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, a, b in pairs}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 256, 4, 2, 16), {}),
        ((1, 150, 2, 1, 8), {"window": 37}),
        ((1, 200, 2, 2, 40), {"softcap": 0.7}),
        ((2, 129, 4, 2, 16), {"window": 64, "softcap": 2.0, "sinks": True}),
    ],
)
def test_splash_is_xla(shape: tuple[int, int, int, int, int], options: dict[str, Any]) -> None:
    """Whole blocks and padded ones, grouped heads, documents, padding; two float32 sums in different order."""
    assert max(errors(*shape, **options).values()) < 1e-6


@pytest.mark.parametrize(
    "mesh",
    [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=2, context=2, tensor=2), config.Mesh(data=2, tensor=4)],
)
def test_a_mesh_changes_nothing(mesh: config.Mesh) -> None:
    """Rows, heads and the queries' tokens are split, also 2 kv heads over 4; each device has its part of the mask."""
    assert max(errors(4, 300, 4, 2, 8, Layout.from_config(mesh), window=100, sinks=True).values()) < 1e-6


def test_a_decoder_with_splash_is_one_with_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mesh that splits the sequence, with all that the kernel knows."""
    calls, kernel = [], splash.splash
    monkeypatch.setattr(
        splash, "splash", lambda *arrays, **options: calls.append(options) or kernel(*arrays, **options)
    )
    options: Any = {"window": 20, "softcap": 3.0, "sink_logits": True, "layer_loop": "unroll"}
    model = config.Model(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, **options)
    places, tokens = rows(2, 60), jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 60)), jnp.int32)
    policy = Policy.from_config(config.Numerics(matmul="highest"))
    params = init_params(Decoder(model, policy), jax.random.key(0))

    def gradients(impl: str) -> Any:
        decoder = Decoder(dataclasses.replace(model, attention_impl=impl), policy)

        def loss(params: Any) -> jax.Array:
            logits, _ = decoder.apply({"params": params}, tokens, *places)
            return jnp.mean(jnp.where((places.segments != 0)[..., None], logits, 0) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradients("xla")
    with Layout.from_config(config.Mesh(data=2, context=2, tensor=2)).active():
        got = gradients("splash")
    assert calls and all(call["sink_logits_N"] is not None for call in calls)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    padding=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    window=st.integers(0, 5),
)
def test_a_mask_by_index_is_the_mask_by_position(lengths: list[int], padding: list[int], window: int) -> None:
    """What the kernel is told: index and segment. It holds for any documents, if their tokens follow one another."""
    padding = [*padding[: len(lengths)], 48 - sum(lengths) - sum(padding[: len(lengths)])]
    places = packed(lengths, padding)
    assert (by_index(places, window) == np.asarray(visible(places, places, window))).all()


def test_it_needs_tokens_that_follow_one_another() -> None:
    """A document with a gap has other distances: such rows are not aligned, and `ops.attention` is told so."""
    places = Places(jnp.asarray([[0, 1, 5, 6]], jnp.int32), jnp.ones((1, 4), jnp.int32))
    assert (by_index(places, 3) != np.asarray(visible(places, places, 3))).any()


def by_index(places: Places, window: int) -> np.ndarray:
    t, segments = places.segments.shape[1], np.asarray(places.segments)[0]
    back = np.arange(t)[:, None] - np.arange(t)
    seen = (back >= 0) & (back < window if window else True)
    return (seen & (segments[:, None] == segments) & (segments != 0)[:, None])[None]


@pytest.mark.parametrize("fault", ["one token more", "one document"])
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of rounding stay below 1e-6, those of a mistake do not."""
    window, ids = splash.pallas.LocalMask, splash.pallas.SegmentIds
    if fault == "one token more":
        monkeypatch.setattr(
            splash.pallas, "LocalMask", lambda square, size, offset: window(square, (size[0] + 1, 0), 0)
        )
    else:
        monkeypatch.setattr(splash.pallas, "SegmentIds", lambda mine, theirs: ids(mine != 0, theirs != 0))
    assert errors(1, 128, 1, 1, 8, window=20)["out"] > 1e-2
