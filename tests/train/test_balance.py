"""Balancing while training: a skewed router evens out, the bias is no matter of the gradient, a run resumes with it."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.recipes.pretrain import loss_fn
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import init_state, make_eval, make_step

B, T, V, E = 8, 32, 32, 4
EXPERTS = config.MoE(n_experts=E, d_ff=16, impl="naive", selection_bias=True, bias_update_rate=0.02)
MODEL = config.Model(
    pattern=("attention+moe",), vocab_size=V, d_model=16, n_layers=2, n_heads=2, d_ff=16, max_seq_len=T, moe=EXPERTS
)
TRAIN = config.Train(batch_size=B, steps=100, warmup_steps=2, learning_rate=1e-4, weight_decay=0.5)
BIAS = ("ffn", "router", "selection_bias")


@pytest.fixture
def batch(rng):
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    segments = np.broadcast_to(np.arange(T) < T - 5, (B, T)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segments": segments,
        "weights": segments.astype(np.float32),
    }


def setup(train=TRAIN, skew=0.0, layer_loop="unroll", biases=(), **options):
    """A jitted step and the first state, whose routers are `skewed`."""
    moe = dataclasses.replace(EXPERTS, **options)
    model = dataclasses.replace(MODEL, moe=moe, layer_loop=layer_loop, biases=biases)
    decoder, optimizer = Decoder(model), make_optimizer(train)
    params = init_params(decoder, jax.random.key(0))
    if skew:
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: skewed(path, leaf, skew), params)
    step = make_step(loss_fn(decoder, train), optimizer, train, seed=0, model=model)
    return jax.jit(step), init_state(params, optimizer), decoder


def skewed(path, leaf, skew):
    """Logits of order 1, and every token prefers the last experts."""
    where = jax.tree_util.keystr(path, simple=True, separator=".")
    if where.endswith("router.bias"):
        return skew * jnp.arange(E, dtype=leaf.dtype)
    return 15 * leaf if where.endswith("router.kernel") else leaf


def biases(state):
    """The selection biases of both layers."""
    found = []
    for layer in (0, 1):
        leaf = state.params[f"layers_{layer}"]
        for key in BIAS:
            leaf = leaf[key]
        found.append(np.asarray(leaf))
    return np.stack(found)


@pytest.mark.parametrize("rate", [0.02, 0.0])
def test_a_skewed_router_becomes_balanced_by_its_bias(rate, batch):
    """Without an update of the bias, nobody balances: that was the original's fault."""
    step, state, _ = setup(skew=1.0, bias_update_rate=rate, biases=("router",))
    loads = []
    for _ in range(60):
        state, metrics = step(state, {}, batch)
        loads.append(float(metrics["load_max"]))
    assert loads[0] > 1.7
    assert loads[-1] < 1.2 if rate else loads[-1] > 1.7
    assert metrics["expert_load"].sum() == 2 * B * (T - 5) * EXPERTS.top_k  # padding is in no expert's load


@pytest.mark.parametrize("loss", ["balance_loss", "importance_loss"])
def test_a_skewed_router_becomes_balanced_by_a_loss(loss, batch):
    train = dataclasses.replace(TRAIN, learning_rate=3e-2, weight_decay=0.0)
    step, state, _ = setup(train, skew=1.0, selection_bias=False, biases=("router",), **{loss: 1.0})
    first = step(state, {}, batch)[1]
    for _ in range(60):
        state, metrics = step(state, {}, batch)
    assert first["load_max"] > 1.7 > metrics["load_max"]
    assert first["balance_loss"] > 1.2 and metrics["balance_loss"] < 1.1


def test_only_the_load_moves_the_bias(batch):
    """By the rate, up or down; neither by the gradient nor by the decay, and not where the update is skipped."""
    step, state, _ = setup()
    after, metrics = step(state, {}, batch)
    load = np.asarray(metrics["expert_load"])
    np.testing.assert_allclose(biases(after), 0.02 * np.sign(load.mean(axis=1, keepdims=True) - load), rtol=1e-6)
    assert metrics["bias_range"] == np.ptp(biases(after), axis=1).max()
    skipped, _ = step(after, {}, {**batch, "weights": np.full((B, T), np.nan, np.float32)})
    np.testing.assert_array_equal(biases(skipped), biases(after))
    still, state, _ = setup(bias_update_rate=0.0)
    state = state._replace(params=after.params)
    np.testing.assert_array_equal(biases(still(state, {}, batch)[0]), biases(after))


def test_scanned_layers_have_the_load_of_unrolled_ones(batch):
    (unrolled, state, _), (scanned, stacked, _) = setup(), setup(layer_loop="scan")
    for _ in range(2):
        state, metrics = unrolled(state, {}, batch)
        stacked, others = scanned(stacked, {}, batch)
        np.testing.assert_array_equal(metrics["expert_load"], others["expert_load"])
    stack = stacked.params["layers"]["slot_0"]["ffn"]["router"]["selection_bias"]
    np.testing.assert_array_equal(biases(state), stack)


def test_noise_is_drawn_while_training_only(batch):
    step, state, decoder = setup(noisy=True, bias_update_rate=0.0)
    frozen = state._replace(step=state.step + 1)
    losses = [float(step(one, {}, batch)[1]["loss"]) for one in (state, state, frozen)]
    assert losses[0] == losses[1] != losses[2]
    evaluate = jax.jit(make_eval(loss_fn(decoder, TRAIN)))
    assert evaluate(state.params, {}, batch)["nll"] == evaluate(state.params, {}, batch)["nll"]
    after, _ = step(state, {}, batch)
    noise = after.params["layers_0"]["ffn"]["router"]["noise"]["kernel"]
    assert np.any(noise), "the noise is learned"


@pytest.mark.usefixtures("one_device")
def test_resuming_is_bitwise(runs, tmp_path, leaves, rows):
    options = ('model.pattern=["attention+moe"]', "model.moe.selection_bias=true", "model.moe.balance_loss=0.01")
    options += ("model.moe.noisy=true", "checkpoint.keep=9", "eval.every=100")
    whole, part = tmp_path / "whole", tmp_path / "part"
    runs.train(whole, *options)
    shutil.copytree(whole, part)
    for step in (9, 12):
        shutil.rmtree(part / "checkpoints" / str(step))
    runs.train(part, *options, resume=True)
    found, expected = leaves(part), leaves(whole)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
    assert any("selection_bias" in name and array.any() for name, array in expected.items() if "params" in name)
    last = rows(part)[-1] if "expert_load" in rows(part)[-1] else rows(part)[-2]
    assert rows(part) == rows(whole) and np.shape(last["expert_load"]) == (2, 8)
    assert {"balance_loss", "router_z", "router_entropy", "dropped", "load_max", "bias_range"} < last.keys()
