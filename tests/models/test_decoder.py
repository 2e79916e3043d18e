"""The decoder: sizes, initial values, and one model whether scanned or unrolled."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import config
from jaxlm.models.decoder import Decoder, abstract_params, init_cache, init_params, unrolled, unstack_layers
from jaxlm.numerics import Policy

B, T = 2, 12
TINY = config.Model(vocab_size=40, d_model=16, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=24, max_seq_len=T)
SHOWCASE = config.Model(
    vocab_size=256,
    d_model=128,
    n_layers=4,
    n_heads=8,
    d_ff=512,
    max_seq_len=128,
    norm="layernorm",
    norm_position="post",
    final_norm=False,
    activation="relu",
    biases=("mlp", "head"),
    positions="sinusoidal",
    tie_embeddings=False,
)


def by_hand(m: config.Model) -> int:
    """Parameters of a dense decoder, term by term."""
    d, h = m.d_model, m.head_dim
    norm = d * (2 if m.norm == "layernorm" else 1)
    attention = d * h * (2 * m.n_heads + 2 * m.n_kv_heads) + (2 * h if m.qk_norm else 0)
    attention += h * (m.n_heads + 2 * m.n_kv_heads) if "qkv" in m.biases else 0
    attention += d if "attention_out" in m.biases else 0
    matrices = 3 if m.activation == "swiglu" else 2
    ffn = matrices * d * m.d_ff + ((matrices - 1) * m.d_ff + d if "mlp" in m.biases else 0)
    head = 0 if m.tie_embeddings else d * m.vocab_size + (m.vocab_size if "head" in m.biases else 0)
    positions = m.max_seq_len * d if m.positions == "learned" else 0
    return m.vocab_size * d + positions + m.n_layers * (attention + ffn + 2 * norm) + norm * m.final_norm + head


def count(model: config.Model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(Decoder(model))[0]))


def test_the_showcase_has_856832_parameters():
    assert count(SHOWCASE) == by_hand(SHOWCASE) == 856_832


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_kv_heads": 1, "head_dim": 6},
        {"biases": ("qkv", "attention_out", "mlp", "head"), "tie_embeddings": False},
        {"biases": ("mlp",), "activation": "gelu", "norm": "layernorm"},
        {"positions": "learned", "qk_norm": True, "final_norm": False},
        {"layer_loop": "scan", "pattern": ("attention+mlp", "attention+mlp")},
    ],
)
def test_sizes_follow_the_formula(options):
    model = dataclasses.replace(TINY, **options)
    assert count(model) == by_hand(model)


def inputs(seed):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 40, (B, T)).astype(np.int32)
    segments = np.repeat([[1] * 5 + [2] * 5 + [0] * 2], B, axis=0).astype(np.int32)
    positions = np.repeat([[*range(5), *range(5), 0, 0]], B, axis=0).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)


@pytest.mark.parametrize("pattern", [("attention+mlp",), ("attention+mlp", "attention+mlp")])
def test_scan_equals_unroll(pattern, seed):
    with jax.enable_x64(True):
        policy = Policy.from_config(config.Numerics(params="float64", compute="float64"))
        decoder = Decoder(dataclasses.replace(TINY, layer_loop="scan", pattern=pattern), policy)
        params = init_params(decoder, jax.random.key(0))
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape, p.dtype), params)
        flat = unrolled(decoder)
        stacked, _ = decoder.apply({"params": params}, *inputs(seed))
        plain, _ = flat.apply({"params": unstack_layers(params, decoder.config)}, *inputs(seed))
        assert jax.tree.structure(abstract_params(flat)[0]) == jax.tree.structure(
            unstack_layers(params, decoder.config)
        )
        np.testing.assert_allclose(stacked, plain, rtol=1e-12, atol=1e-13)


def test_a_scanned_program_does_not_grow_with_depth():
    def lines(layers: int, layer_loop: str) -> int:
        decoder = Decoder(dataclasses.replace(TINY, n_layers=layers, layer_loop=layer_loop))
        shapes = {"params": abstract_params(decoder)[0]}
        loss = lambda variables, *args: decoder.apply(variables, *args)[0].sum()  # noqa: E731
        return len(jax.jit(jax.grad(loss)).lower(shapes, *inputs(0)).compile().as_text().splitlines())

    assert lines(16, "scan") < 1.1 * lines(4, "scan")
    assert lines(8, "unroll") > 1.5 * lines(4, "unroll")
    assert not config.Model(n_layers=8).scanned and config.Model(n_layers=9).scanned


def test_initial_values_have_the_spread_of_the_table():
    model = dataclasses.replace(TINY, d_model=64, d_ff=192, n_layers=6, init_std=0.05, tie_embeddings=False)
    model = dataclasses.replace(model, n_heads=4, head_dim=16, vocab_size=300, biases=("qkv", "mlp", "head"))
    params = init_params(Decoder(model), jax.random.key(1))
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.endswith(("scale", "bias")):
            np.testing.assert_array_equal(leaf, 1.0 if name.endswith("scale") else 0.0, name)
            continue
        std = 0.05 / 12**0.5 if "o_proj" in name or "down_proj" in name else 0.05
        sigma = std / (2 * leaf.size) ** 0.5  # of the standard deviation of a normal sample
        assert abs(float(jnp.std(leaf)) - std) < 5 * sigma, name
        assert abs(float(jnp.mean(leaf))) < 5 * std / leaf.size**0.5, name


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_no_two_layers_start_equal(layer_loop):
    decoder = Decoder(dataclasses.replace(TINY, layer_loop=layer_loop))
    flat = unstack_layers(init_params(decoder, jax.random.key(0)), decoder.config)
    kernels = [np.asarray(flat[f"layers_{i}"]["ffn"]["up_proj"]["kernel"]) for i in range(4)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(kernels) for b in kernels[:i])


def test_no_token_sees_the_future_or_another_document(seed):
    decoder = Decoder(TINY)
    params = init_params(decoder, jax.random.key(0))
    tokens, positions, segments = inputs(seed)
    before, _ = decoder.apply({"params": params}, tokens, positions, segments)
    changed = tokens.at[:, 3].set((tokens[:, 3] + 1) % 40)  # the fourth token of the first document
    after, _ = decoder.apply({"params": params}, changed, positions, segments)
    moved = np.abs(np.asarray(after - before)).max(axis=(0, 2)) > 0
    assert moved.tolist() == [False] * 3 + [True] * 2 + [False] * 7


def test_the_cache_gives_the_same_logits(seed):
    decoder = Decoder(TINY)
    params = {"params": init_params(decoder, jax.random.key(0))}
    tokens = inputs(seed)[0]
    positions = jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1))
    segments = jnp.ones_like(tokens)
    whole, _ = decoder.apply(params, tokens, positions, segments)
    cache, parts = init_cache(decoder, B, T), []
    for begin, end in ((0, 7), (7, 8), (8, 12)):
        piece = tuple(x[:, begin:end] for x in (tokens, positions, segments))
        logits, cache = decoder.apply(params, *piece, cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=2e-5, atol=2e-6)


def test_a_layer_that_is_not_there_has_no_output():
    decoder, ids = Decoder(TINY), jax.ShapeDtypeStruct((B, T), jnp.int32)
    outputs = lambda params, *places: decoder.apply({"params": params}, *places, layers=(4,), method="hidden")  # noqa: E731
    with pytest.raises(ValueError, match=r"layers \[4\]: the model has 4, from 0 on"):
        jax.eval_shape(outputs, abstract_params(decoder)[0], ids, ids, ids)


def test_nnx_tools_can_hold_the_decoder(seed):
    decoder = Decoder(TINY)
    with flax.config.temp_flip_flag("always_shard_variable", False):  # the axes are logical, there is no mesh here
        wrapped = nnx.bridge.ToNNX(decoder, rngs=nnx.Rngs(0)).lazy_init(*inputs(seed))
    state = nnx.to_pure_dict(nnx.state(wrapped, nnx.Param))
    params = jax.tree.map(jnp.asarray, state)
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(decoder)[0])
    expected, _ = decoder.apply({"params": params}, *inputs(seed))
    np.testing.assert_allclose(wrapped(*inputs(seed))[0], expected, rtol=1e-6, atol=1e-6)
