"""A NaN in the rows of one device skips the update on all of them, as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.recipes.pretrain import loss_fn
from jaxlm.train.optim import make_optimizer
from jaxlm.train.program import state_shardings
from jaxlm.train.step import init_state, make_step

B, T, V = 8, 8, 32
MODEL = config.Model(vocab_size=V, d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=32, max_seq_len=T)


@pytest.mark.parametrize(("mesh", "row"), [(config.Mesh(data=4, tensor=2), 0), (config.Mesh(data=1, fsdp=8), B - 1)])
def test_a_nan_of_one_host_changes_nothing_anywhere(mesh, row):
    layout, train = Layout.from_config(mesh), config.Train(batch_size=B, steps=4, warmup_steps=1)
    decoder, optimizer = Decoder(MODEL), make_optimizer(train)
    shardings = state_shardings(decoder, optimizer, layout)
    make = jax.jit(lambda key: init_state(init_params(decoder, key), optimizer), out_shardings=shardings)
    step = jax.jit(
        make_step(loss_fn(decoder, train), optimizer, train, seed=0, layout=layout),
        out_shardings=(shardings, layout.replicated),
    )
    tokens = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
    whole = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch = {"tokens": tokens, "targets": tokens, "positions": whole, "segments": np.ones_like(tokens)}
    good = {**batch, "weights": np.ones((B, T), np.float32)}
    weights = good["weights"].copy()
    weights[row, 3] = np.nan
    bad = {**batch, "weights": weights}

    begun = make(jax.random.key(0))
    poisoned, metrics = step(begun, {}, layout.place(bad, B))
    assert metrics["skipped"] == 1 and poisoned.skipped == 1 and poisoned.step == 1
    for before, after in zip(jax.tree.leaves(begun.params), jax.tree.leaves(poisoned.params), strict=True):
        for one, other in zip(before.addressable_shards, after.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)  # on every device by itself
    expected, _ = step(begun._replace(step=jnp.ones((), jnp.int32)), {}, layout.place(good, B))
    found, metrics = step(poisoned, {}, layout.place(good, B))
    assert metrics["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))
