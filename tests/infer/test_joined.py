"""Joined maps compute what their parts do, take no more memory, and leave parameters as they are."""

from __future__ import annotations

import re
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm import config
from jaxlm.infer.engine.on_jax import joined as module
from jaxlm.infer.engine.on_jax import programs
from jaxlm.infer.engine.on_jax.joined import joined, joined_for_decoding, second_copy, tell_second_copy
from jaxlm.infer.engine.on_jax.runner import JaxRunner
from jaxlm.infer.engine.runner import Orders
from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.models.decoder import Decoder
from jaxlm.numerics import Policy
from tests.infer.test_engine import random_params

SIZES: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "vocab_size": 40, "max_seq_len": 32}
WITH_BIASES: dict[str, Any] = {"biases": ("qkv", "mlp"), "qk_norm": True, "sink_tokens": 2}


def made(dtype: str = "float64", **options: Any) -> tuple[Decoder, Any]:
    cfg = config.Model(**{"n_layers": 2, "layer_loop": "unroll", **SIZES, **options})
    decoder = Decoder(cfg, Policy(np.dtype(dtype), np.dtype(dtype)))
    return decoder, random_params(decoder)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"qkv_proj", "gate_up_proj"}),
        (WITH_BIASES, {"qkv_proj", "gate_up_proj"}),
        ({"activation": "gelu", "pattern": ("attention(n_kv_heads=1)+mlp", "mamba")}, {"qkv_proj"}),
        ({"pattern": ("attention+moe",), "moe": config.MoE(n_experts=2, top_k=1, n_shared=1)}, {"qkv_proj"}),
        ({"layer_loop": "scan"}, set()),
    ],
)
def test_the_same_numbers_of_the_same_bytes(options: dict[str, Any], names: set[str]) -> None:
    ids = jnp.asarray([[5, 8, 2, 7, 31]])
    with jax.enable_x64(True):
        decoder, params = made(**options)
        whole = joined(dict(params))
        keys = {key.key for path, _ in jax.tree_util.tree_leaves_with_path(whole) for key in path}
        assert keys & {"qkv_proj", "gate_up_proj"} == names
        sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, whole)]
        assert sizes[0] == sizes[1]
        logits = [
            np.asarray(decoder.apply({"params": tree}, ids, jnp.arange(5)[None], jnp.ones_like(ids))[0])
            for tree in (params, whole)
        ]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-12, atol=1e-12)


def test_what_is_joined_already_in_two_dtypes_or_on_two_devices_stays() -> None:
    _, params = made("float32")
    again = joined(joined(dict(params)))
    assert jax.tree.structure(again) == jax.tree.structure(joined(dict(params)))
    mixer = params["layers_1"]["mixer"]
    mixer["k_proj"] = {"kernel": mixer["k_proj"]["kernel"].astype(jnp.bfloat16)}
    whole = joined(dict(params))
    assert "qkv_proj" in whole["layers_0"]["mixer"] and "qkv_proj" not in whole["layers_1"]["mixer"]
    assert whole["layers_1"]["mixer"]["k_proj"]["kernel"].dtype == jnp.bfloat16
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]), PartitionSpec())
    assert "qkv_proj" not in joined(jax.device_put(params, everywhere))["layers_0"]["mixer"]


def test_copies_go_and_what_was_handed_in_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer that unrolling has copied is let go when its maps are joined, before the next one's are."""
    seen: list[int] = []
    one = module._with_joined_maps

    def counted(layer: Any) -> Any:
        seen.append(sum(one_of() is not None for one_of in kernels))
        return one(layer)

    decoder, params = made("float32", layer_loop="scan", n_layers=3)
    made_decoder, own = unrolled_for_decoding(decoder, params)
    kernels = [weakref.ref(own[f"layers_{i}"]["mixer"]["q_proj"]["kernel"]) for i in range(3)]
    monkeypatch.setattr(module, "_with_joined_maps", counted)
    whole = joined(own)
    assert own == {} and seen == [3, 2, 1] and "qkv_proj" in whole["layers_2"]["mixer"]
    before = jax.tree.structure(params)
    joined_for_decoding(made_decoder, unrolled_for_decoding(decoder, params)[1])
    joined_for_decoding(decoder, params)
    assert jax.tree.structure(params) == before


def test_a_step_makes_four_products_a_layer_and_the_logits() -> None:
    """Besides those of attention over its 128 slots: q, k, v; out; gate, up; down."""
    cfg = config.Model(**SIZES, n_layers=3)
    decoder = Decoder(cfg)
    runner = JaxRunner(decoder, random_params(decoder), rows=2, slots=32, widths=(16,))
    orders = Orders.empty(runner.rows, runner.vocab)
    lowered = programs.decode.lower(programs.Placed(runner.decoder), runner.params, runner.state, orders)
    text = lowered.compile().as_text() or ""
    widths = [int(width) for width in re.findall(r"= f32\[2,(\d+)\]\S* dot\(", text)]
    assert sorted(width for width in widths if width < 128) == sorted([32, 16, 48, 16] * cfg.n_layers + [40])


@pytest.mark.parametrize("options", [{}, {"pattern": ("attention+moe", "mamba")}, {"layer_loop": "scan"}], ids=str)
def test_the_second_copy_is_counted(options: dict[str, Any]) -> None:
    """Bytes of the buffers that decoding has and the model has not."""
    decoder, params = made("float32", **{"moe": config.MoE(n_experts=2, top_k=1), "n_layers": 2, **options})
    before = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    after = jax.tree.leaves(joined_for_decoding(decoder, params)[1])
    assert second_copy(decoder) == sum(leaf.nbytes for leaf in after if leaf.unsafe_buffer_pointer() not in before) > 0


def test_a_large_second_copy_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, _ = made("float32")
    caplog.set_level("INFO", "jaxlm")
    tell_second_copy(decoder, None)
    assert not caplog.messages
    monkeypatch.setattr(module, "TOLD_FROM", 1)
    tell_second_copy(decoder, None)
    assert caplog.messages == [
        "decoding takes 0.00 GiB of weights a second time: joined queries, keys and values, gate and up"
    ]
