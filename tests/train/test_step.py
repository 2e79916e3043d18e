"""The update: microbatches, clip, decay, guard, dropout, recomputation, memory."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import config
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy
from jaxlm.recipes.pretrain import loss_fn
from jaxlm.run.schedule import learning_rate
from jaxlm.train.optim import decay_mask, make_optimizer
from jaxlm.train.step import init_state, make_eval, make_step

B, T, V = 8, 8, 32
MODEL = config.Model(vocab_size=V, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=32, max_seq_len=T)
TRAIN = config.Train(batch_size=B, steps=20, warmup_steps=2, learning_rate=1e-2)


@pytest.fixture
def batch(rng):
    """Rows with very different numbers of targets."""
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    weights = (np.arange(T) < np.arange(1, B + 1)[:, None]).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
        "segments": np.ones((B, T), np.int32),
        "weights": weights,
    }


def setup(model=MODEL, train=TRAIN, dtype="float64"):
    """A jitted step and the first state."""
    policy = Policy.from_config(config.Numerics(params=dtype, compute=dtype))
    decoder, optimizer = Decoder(model, policy), make_optimizer(train)
    step = make_step(loss_fn(decoder, train), optimizer, train, seed=0)
    state = jax.jit(lambda key: init_state(init_params(decoder, key), optimizer))(jax.random.key(0))
    return jax.jit(step, donate_argnums=0), state, decoder


def assert_close(left, right, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), left, right)


def test_microbatches_equal_the_large_batch(batch):
    with jax.enable_x64(True):
        results = []
        for microbatches in (1, 4):
            step, state, _ = setup(train=dataclasses.replace(TRAIN, microbatches=microbatches))
            for _ in range(2):
                state, metrics = step(state, {}, batch)
            results.append((state, metrics))
        assert_close(*results)
        assert results[0][1]["weight"] == batch["weights"].sum()


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_recomputation_changes_nothing(batch, remat, layer_loop):
    with jax.enable_x64(True):
        model = dataclasses.replace(MODEL, layer_loop=layer_loop)
        plain, other = (setup(dataclasses.replace(model, remat=choice))[:2] for choice in ("none", remat))
        assert_close(plain[0](plain[1], {}, batch), other[0](other[1], {}, batch))


def test_clipping_bounds_the_gradient_that_the_optimiser_sees(batch):
    with jax.enable_x64(True):
        for clip in (0.0, 1e-3):
            train = dataclasses.replace(TRAIN, clip_norm=clip)
            step, state, _ = setup(train=train)
            state, metrics = step(state, {}, batch)
            mu = optax.tree.norm(optax.tree.get(state.opt_state, "mu")) / (1 - train.beta1)
            expected = min(metrics["grad_norm"], clip * metrics["grad_norm"] / (metrics["grad_norm"] + 1e-6) or np.inf)
            np.testing.assert_allclose(mu, expected, rtol=1e-9)


def test_decay_takes_kernels_and_embeddings_only(batch):
    biases = ("qkv", "attention_out", "mlp", "head")
    model = dataclasses.replace(MODEL, norm="layernorm", biases=biases, tie_embeddings=False, positions="learned")
    _, state, _ = setup(model, dtype="float32")
    flat = jax.tree_util.tree_flatten_with_path(decay_mask(state.params))[0]
    assert {path[-1].key: decays for path, decays in flat} == {
        "kernel": True,
        "embedding": True,
        "scale": False,
        "bias": False,
    }
    train = dataclasses.replace(TRAIN, weight_decay=0.5, warmup_steps=0, schedule="constant")
    step, state, _ = setup(model, train, dtype="float32")
    before = jax.tree.map(np.array, state.params)
    after = step(state, {}, batch | {"weights": np.zeros((B, T), np.float32)})[0].params  # no target: decay alone
    mask = decay_mask(before)
    expected = jax.tree.map(lambda p, decays: p * (1 - 0.5e-2) if decays else p, before, mask)
    assert_close(after, expected, 1e-6)


def test_a_non_finite_update_changes_only_the_counters(batch):
    step, state, _ = setup(dtype="float32")
    state, _ = step(state, {}, batch)
    before = jax.tree.map(np.array, state)
    bad = batch | {"weights": np.full((B, T), np.nan, np.float32)}
    for skipped in (1, 2):
        state, metrics = step(state, {}, bad)
        assert metrics["skipped"] == skipped == state.skipped
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=0, skipped=0), before._replace(step=0, skipped=0))
    assert state.step == 3
    state, metrics = step(state, {}, batch)
    assert metrics["skipped"] == 0 and not np.array_equal(
        state.params["embed"]["embedding"], before.params["embed"]["embedding"]
    )


def test_the_state_is_donated(batch):
    step, state, _ = setup(dtype="float32")
    old = jax.tree.leaves(state)
    step(state, {}, batch)
    assert all(leaf.is_deleted() for leaf in old)


def test_the_loss_falls(batch):
    step, state, _ = setup(dtype="float32")
    losses = []
    for _ in range(20):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_full_logits_are_never_stored():
    tokens, vocabulary = B * 32, 1000
    model = dataclasses.replace(MODEL, vocab_size=vocabulary, max_seq_len=32)
    ids = jax.ShapeDtypeStruct((B, 32), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((B, 32), jnp.float32)

    def largest(loss_block: int) -> int:
        step, state, _ = setup(model, dataclasses.replace(TRAIN, loss_block=loss_block), dtype="float32")
        shapes = re.findall(
            rf"f32\[([\d,]+,{vocabulary}|{vocabulary},[\d,]+)\]", step.lower(state, {}, batch).compile().as_text()
        )
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    assert largest(loss_block=64) == 64 * vocabulary
    assert largest(loss_block=tokens) == tokens * vocabulary


def test_dropout_differs_in_each_step_and_is_the_same_again(batch):
    train = dataclasses.replace(TRAIN, learning_rate=1e-30, weight_decay=0.0)
    step, state, decoder = setup(dataclasses.replace(MODEL, dropout=0.5), train, dtype="float32")
    third = state._replace(step=jnp.asarray(2, jnp.int32))
    copy = jax.tree.map(jnp.array, third)
    losses = []
    for _ in range(3):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    assert float(step(copy, {}, batch)[1]["loss"]) == losses[2], "randomness depends on the seed and the step alone"
    evaluate = jax.jit(make_eval(loss_fn(decoder, train)))
    plain = jax.jit(make_eval(loss_fn(decoder.clone(config=MODEL), train)))
    assert evaluate(state.params, {}, batch)["loss"] == plain(state.params, {}, batch)["loss"], "none in evaluation"


def test_dropout_has_its_rate():
    model = dataclasses.replace(MODEL, dropout=0.3, n_layers=1, positions="none", layer_loop="unroll")
    decoder = Decoder(model)
    params = init_params(decoder, jax.random.key(0))
    params = jax.tree.map(jnp.zeros_like, params)  # the block adds nothing, the residual is the embedding
    params["embed"]["embedding"] = jnp.ones((V, 16))
    params["final_norm"]["scale"] = jnp.ones(16)
    ids = jnp.zeros((64, T), jnp.int32)
    hidden, _ = decoder.apply(
        {"params": params}, ids, ids, ids + 1, method="hidden", rngs={"dropout": jax.random.key(1)}
    )
    count = hidden.size
    assert abs(float(jnp.mean(hidden == 0)) - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5


def rates(**options) -> list[float]:
    train = config.Train(steps=100, learning_rate=1.0, **{"warmup_steps": 10, "final_lr_fraction": 0.1, **options})
    found = [float(learning_rate(train, step)) for step in range(100)]
    on_device = [float(learning_rate(train, jnp.float32(step), jnp)) for step in (0, 9, 50, 99)]
    np.testing.assert_allclose(on_device, [found[step] for step in (0, 9, 50, 99)], rtol=1e-6)
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_schedules_at_their_corners(schedule):
    found = rates(schedule=schedule)
    np.testing.assert_allclose(found[:10], np.arange(1, 11) / 10)
    assert found[9] == 1.0, "the peak at warmup_steps"
    last = 1.0 if schedule == "constant" else 0.1
    np.testing.assert_allclose(found[-1], last)
    middle = {"cosine": 0.55, "linear": 0.55, "wsd": 1.0, "constant": 1.0}[schedule]
    np.testing.assert_allclose(found[54], middle)  # halfway between steps 10 and 100
    if schedule == "wsd":
        assert found[81] == 1.0 > found[82], "the last fifth of the 90 steps decays"
    assert all(a >= b for a, b in itertools.pairwise(found[9:]))


def test_schedules_without_and_with_nothing_but_warm_up():
    assert rates(warmup_steps=0)[0] < 1.0 and rates(warmup_steps=0, schedule="constant") == [1.0] * 100
    np.testing.assert_allclose(rates(warmup_steps=1000)[-1], 0.1)
