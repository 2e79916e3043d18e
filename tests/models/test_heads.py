"""Heads on a mesh: eight devices score packed rows as one does, and their gradients are the same, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, abstract_params, init_params
from jaxlm.numerics import Policy

B, T = 8, 8
CFG = config.Model(vocab_size=32, d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=32, max_seq_len=T)
POLICY = Policy.from_config(config.Numerics(params="float64", compute="float64"))


@pytest.mark.parametrize("head", ["value", "classes"])
def test_eight_devices_score_as_one(head, rng):
    model = Decoder(dataclasses.replace(CFG, head=head, classes=3), POLICY)
    documents = {"method": "score_documents", "documents": 2} if head == "classes" else {}
    starts = rng.integers(1, T, (B, 1))
    segments = np.where(np.arange(T) < starts, 1, 2) * (np.arange(T) < T - 1)
    positions = np.where(np.arange(T) < starts, np.arange(T), np.arange(T) - starts)
    batch = {
        "tokens": rng.integers(0, 32, (B, T)).astype(np.int32),
        "positions": positions.astype(np.int32),
        "segments": segments.astype(np.int32),
    }

    def scores_and_gradients(layout):
        shapes, axes = abstract_params(model)
        params = jax.jit(lambda key: init_params(model, key), out_shardings=layout.shardings(axes, shapes))(
            jax.random.key(0)
        )

        def loss(params, batch):
            scores, _ = model.apply({"params": params}, *batch.values(), **documents)
            return (jnp.sin(3 * scores + 1)).sum(), scores

        with layout.active():
            return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params, layout.place(batch)))

    with jax.enable_x64(True):
        one = scores_and_gradients(Layout.from_config(config.Mesh(), jax.devices()[:1]))
        eight = scores_and_gradients(Layout.from_config(config.Mesh(data=2, fsdp=2, tensor=2)))
    assert one[1].dtype == np.float64 and np.any(one[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13), one, eight)
