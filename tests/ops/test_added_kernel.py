"""A kernel of attention is one row of the table: nothing else has to know it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy
from jaxlm.ops.attention import kernels
from jaxlm.ops.attention.xla import xla

MODEL: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_seq_len": 300,
    "layer_loop": "unroll",
}


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        ({}, None),
        ({"window": 20, "softcap": 3.0}, None),
        ({"window": 20, "keep_first": 2, "sink_tokens": 2, "sink_logits": True}, None),
        ({"sink_logits": True}, config.Mesh(data=2, context=4)),
        ({"window": 200}, config.Mesh(data=2, context=2, tensor=2)),
    ],
    ids=str,
)
def test_a_row_of_the_table_is_chosen_and_used(
    options: dict[str, Any], mesh: config.Mesh | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows, sinks and rows that are split over devices; it computes what `xla` does, and is seen to do it."""
    calls: list[int] = []

    def fake(*arrays: Any) -> Any:
        calls.append(arrays[0].shape[1])
        return xla(*arrays)

    rng, policy = np.random.default_rng(0), Policy.from_config(config.Numerics(matmul="highest"))
    tokens = jnp.asarray(rng.integers(0, 32, (2, 256)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(256), (2, 256)), jnp.ones((2, 256), jnp.int32)
    model = config.Model(**MODEL, **options)
    params = init_params(Decoder(model, policy), jax.random.key(0))
    expected = jax.jit(Decoder(model, policy).apply)({"params": params}, tokens, *places)[0]

    first = {"fake": kernels.Kernel(kernels.ALL, lambda call: "", fake)}
    monkeypatch.setattr(kernels, "KERNELS", first | kernels.KERNELS)
    for module in ("mix", "attend", "ring"):
        monkeypatch.setattr(f"jaxlm.ops.attention.{module}.KERNELS", first | kernels.KERNELS)
    apply = lambda: jax.jit(Decoder(model, policy).apply)({"params": params}, tokens, *places)[0]  # noqa: E731
    if mesh is None:
        got = apply()
    else:
        with Layout.from_config(mesh).active():
            got = apply()
    assert calls
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)
