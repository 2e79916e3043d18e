"""State spaces in JAX alone: a recurrence written out, memory, what is trained, first values, options, the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, init_cache, init_params
from jaxlm.ops.ssm import selective_scan, ssd

MODEL = config.Model(vocab_size=32, d_model=16, n_layers=2, pattern=("mamba",), max_seq_len=64)
MAMBA2 = dataclasses.replace(MODEL, pattern=("mamba2",), mamba=config.Mamba(head_dim=8))


def inputs(rng, t, f, p):
    u, dt = rng.standard_normal((2, 1, t, f))
    b, c = rng.standard_normal((2, 1, t, p))
    return u, np.log1p(np.exp(dt)), -np.exp(rng.standard_normal((f, p))), b, c, rng.standard_normal(f)


@pytest.mark.parametrize("impl", ["sequential", "chunked"])
def test_scans_are_the_recurrence(impl, rng):
    """Unit-scale input of 600 tokens, where the scan of S2 was off by up to 2.77."""
    u, dt, a, b, c, d = inputs(rng, 600, 3, 4)
    h, expected = np.zeros((3, 4)), np.zeros((1, 600, 3))
    for t in range(600):
        h = np.exp(dt[0, t, :, None] * a) * h + (dt[0, t] * u[0, t])[:, None] * b[0, t]
        expected[0, t] = h @ c[0, t] + d * u[0, t]
    with jax.enable_x64(True):
        ones = jnp.ones((1, 600), jnp.int32)
        y, state = selective_scan.selective_scan(*map(jnp.asarray, (u, dt, a, b, c, d)), ones, impl=impl)
        np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(state[0].T, h, rtol=1e-11, atol=1e-11)
        # Mamba-2 with heads of one channel and one A a head is the same with equal columns of A.
        same = np.repeat(a[:, :1], 4, axis=1)
        y, _ = selective_scan.selective_scan(*map(jnp.asarray, (u, dt, same, b, c, d)), ones)
        heads = (u[..., None], dt, a[:, 0], b[:, :, None], c[:, :, None], d)
        y2, _ = ssd.ssd(*map(jnp.asarray, heads), ones, impl=impl)
        np.testing.assert_allclose(y2[..., 0], y, rtol=1e-11, atol=1e-11)


def backward(op, arrays):
    def loss(arrays):
        return jnp.sum(jnp.square(op(*arrays, jnp.ones(arrays[0].shape[:2], jnp.int32))[0]))

    return jax.jit(jax.grad(loss)).lower([jnp.asarray(x, jnp.float32) for x in arrays]).compile()


def test_memory_grows_with_the_chunk(rng):
    """Forward and backward: the states of all tokens are never there at once."""
    t, f, p = 4096, 32, 16
    states, arrays = t * f * p * 4, inputs(rng, t, f, p)
    temporary = lambda op, arrays: backward(op, arrays).memory_analysis().temp_size_in_bytes  # noqa: E731
    assert temporary(selective_scan.selective_scan, arrays) < states / 2
    assert temporary(functools.partial(selective_scan.selective_scan, chunk=16), arrays) < states / 3
    assert (
        temporary(functools.partial(selective_scan.selective_scan, impl="sequential"), arrays) > states
    )  # the check can fail
    u, dt, _, _, _, d = arrays
    b, c = rng.standard_normal((2, 1, t, 1, 64))
    heads = (u.reshape(1, t, 2, 16), dt[..., :2], -np.ones(2), b, c, d[:2])
    assert temporary(ssd.ssd, heads) < t * f * 64 * 4 / 2


@pytest.mark.soak
@pytest.mark.parametrize("pattern", ["mamba", "mamba2"])
def test_long_sequences_train(pattern):
    """Forward and backward of 16,384 tokens at a width of 128, in less memory than the states of one layer take."""
    model = config.Model(vocab_size=64, d_model=128, n_layers=2, pattern=(pattern,), max_seq_len=16384)
    decoder = Decoder(model)
    params, ids = init_params(decoder, jax.random.key(0)), jnp.arange(16384)[None]
    loss = lambda p: jnp.mean(decoder.apply({"params": p}, ids % 64, ids, jnp.ones_like(ids), method="hidden")[0] ** 2)  # noqa: E731
    program = jax.jit(jax.grad(loss)).lower(params).compile()
    state = 16 if pattern == "mamba" else 128
    assert program.memory_analysis().temp_size_in_bytes < 16384 * 256 * max(state, 64) * 4
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(program(params)))


@pytest.mark.parametrize("model", [MODEL, MAMBA2], ids=["mamba", "mamba2"])
def test_what_is_trained(model):
    """A and D have gradients, a token's state is d_state numbers a channel, and steps differ between channels."""
    decoder = Decoder(model)
    params = init_params(decoder, jax.random.key(0))
    ids = jnp.arange(20)[None]
    loss = lambda p: jnp.sum(decoder.apply({"params": p}, ids, ids, jnp.ones_like(ids))[0] ** 2)  # noqa: E731
    mixer = jax.jit(jax.grad(loss))(params)["layers_0"]["mixer"]
    assert all(bool(jnp.all(mixer[name] != 0)) for name in ("A_log", "D"))
    inner, state = 32, 16 if model is MODEL else 128
    assert init_cache(decoder, 3, 1)[0].state.size == 3 * inner * state
    bias = mixer["dt_proj"]["bias"] if model is MODEL else mixer["dt_bias"]
    assert bias.shape == (inner if model is MODEL else inner // 8,)


def test_first_values():
    """Steps are even in the logarithm between dt_min and dt_max, none below the floor; A counts, or lies in [1, 16]."""
    for pattern, name in (("mamba", "dt_proj.bias"), ("mamba2", "dt_bias")):
        mamba = config.Mamba(head_dim=2, dt_min=1e-3, dt_max=1e-1, dt_floor=2e-3)
        model = dataclasses.replace(MODEL, d_model=64, n_layers=1, pattern=(pattern,), mamba=mamba)
        mixer = init_params(Decoder(model), jax.random.key(1))["layers_0"]["mixer"]
        bias = functools.reduce(lambda tree, key: tree[key], name.split("."), mixer)
        steps = np.asarray(jax.nn.softplus(bias))
        assert steps.min() > 1.99e-3 and steps.max() < 0.1001
        assert abs(np.mean(steps < 1e-2) - 0.5) < 0.2
        a = np.exp(np.asarray(mixer["A_log"]))
        if pattern == "mamba":
            np.testing.assert_allclose(a, np.broadcast_to(np.arange(1, 17), a.shape), rtol=1e-6)
        else:
            assert a.min() >= 1 and a.max() <= 16 and a.std() > 2
        assert bool(jnp.all(mixer["D"] == 1))


@pytest.mark.parametrize("model", [MODEL, MAMBA2], ids=["mamba", "mamba2"])
def test_the_cache_does_not_grow(model):
    """A step after 100,000 tokens is the program of a step after 100: nothing has another size."""
    sizes = [jax.tree.map(jnp.shape, init_cache(Decoder(model), 2, slots)) for slots in (100, 100_000)]
    assert sizes[0] == sizes[1]
    half = Decoder(model, dataclasses.replace(Decoder(model).policy, compute=jnp.dtype("bfloat16")))
    cache = init_cache(half, 1, 1)[0]
    assert cache.state.dtype == jnp.float32 and cache.conv.dtype == jnp.bfloat16


def test_options():
    """Zeros are filled in by mixer, a block's own options hold, and heads of attention do not matter without any."""
    first, second = (config.Model(d_model=40, pattern=(kind,)) for kind in ("mamba(d_conv=3)", "mamba2(head_dim=8)"))
    a, b = first.halves(first.pattern[0]).mixer.mamba, second.halves(second.pattern[0]).mixer.mamba
    assert (a.d_state, a.dt_rank, a.chunk, a.d_conv) == (16, 3, 8, 3)
    assert (b.d_state, b.chunk) == (128, 64)
    config.Model(d_model=30, n_heads=4, pattern=("mamba",))
    for options, message in (
        ({"pattern": ("mamba2",), "d_model": 30}, "model.mamba.head_dim = 64 does not divide expand * d_model = 60"),
        ({"pattern": ("mamba2(head_dim=20, n_groups=2)",), "d_model": 30}, "does not divide the 3 heads of mamba2"),
        ({"pattern": ("attention+mlp", "mamba"), "d_model": 30}, "model.n_heads = 4 does not divide"),
    ):
        with pytest.raises((UserError, ValueError), match=message.replace("*", r"\*")):
            config.Model(**options)
