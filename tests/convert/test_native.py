"""Canonical names, and the one rule between jaxlm and torch_ref."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.convert import canonical as names
from jaxlm.convert.native import from_torch, to_torch
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, init_params, unrolled, unstack_layers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False, "biases": ("qkv", "attention_out", "mlp", "head"), "norm": "layernorm"},
    {"positions": "learned", "activation": "gelu", "qk_norm": True, "n_kv_heads": 1, "head_dim": 6},
    {"final_norm": False, "n_kv_heads": 4, "pattern": ("attention+mlp",) * 2},
    {
        "pattern": ("attention+mlp", "attention+moe"),
        "moe": config.MoE(n_experts=3, n_shared=1, selection_bias=True, noisy=True),
        "biases": ("router", "experts", "mlp"),
    },
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_names_are_those_of_the_unrolled_tree(make_model: Callable, options: dict, loop: str) -> None:
    cfg = make_model(layer_loop=loop, **options)
    decoder = Decoder(cfg)
    params = init_params(decoder, jax.random.key(1))
    tree = unstack_layers(params, cfg)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator=".").replace("layers_", "layers."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found = dict(names.canonical(params, cfg))
    assert found.keys() == flat.keys()
    for name, leaf in flat.items():
        np.testing.assert_array_equal(found[name], leaf)
    plain = names.from_canonical(found, unrolled(decoder).config)
    assert jax.tree.structure(plain) == jax.tree.structure(tree)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_round_trip(
    make_model: Callable, make_params: Callable, same: Callable, options: dict, loop: str, dtype: str
) -> None:
    cfg = make_model(layer_loop=loop, **options)
    params = make_params(cfg, dtype)
    tensors = dict(to_torch(params, cfg))
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    assert len(tensors) == len(dict(names.canonical(params, cfg)))
    same(from_torch(tensors, cfg), params)
    other = dataclasses.replace(cfg, layer_loop={"scan": "unroll", "unroll": "scan"}[loop])
    back = from_torch(dict(to_torch(from_torch(tensors, other), other)), cfg)
    same(back, params)


def test_rule(make_model: Callable, make_params: Callable) -> None:
    cfg = make_model(biases=("qkv", "attention_out", "head"), tie_embeddings=False, norm="layernorm", layer_loop="scan")
    params = make_params(cfg)
    tensors = dict(to_torch(params, cfg))
    mixer = params["layers"]["slot_0"]["mixer"]
    q, o = mixer["q_proj"]["kernel"][3], mixer["o_proj"]["kernel"][3]
    assert tensors["layers.3.mixer.q_proj.weight"][1 * 4 + 2, 5] == q[5, 1, 2]
    assert tensors["layers.3.mixer.o_proj.weight"][5, 1 * 4 + 2] == o[1, 2, 5]
    assert tensors["layers.3.mixer.q_proj.bias"][1 * 4 + 2] == mixer["q_proj"]["bias"][3, 1, 2]
    np.testing.assert_array_equal(tensors["head.weight"], params["head"]["kernel"].T)
    np.testing.assert_array_equal(tensors["embed.weight"], params["embed"]["embedding"])
    np.testing.assert_array_equal(tensors["final_norm.weight"], params["final_norm"]["scale"])
    np.testing.assert_array_equal(tensors["final_norm.bias"], params["final_norm"]["bias"])


def _poison(value: float) -> Callable[[dict], None]:
    def plant(tensors: dict) -> None:
        tensors["layers.1.ffn.up_proj.weight"] = tensors["layers.1.ffn.up_proj.weight"].copy()
        tensors["layers.1.ffn.up_proj.weight"][2, 3] = value

    return plant


FAULTS: list[tuple[Callable[[dict], Any], str]] = [
    (lambda t: t.pop("final_norm.weight"), "1 tensor missing: final_norm.weight"),
    (lambda t: t.update(other=np.zeros(3)), "1 tensor not expected: other"),
    (
        lambda t: t.update({"layers.2.mixer.q_proj.weight": np.zeros((16, 15), np.float32)}),
        "1 tensor of another shape: layers.2.mixer.q_proj.weight [16, 15] for [16, 16]",
    ),
    (lambda t: t.update({"embed.weight": np.zeros((300, 16), np.int32)}), "1 tensor no float: embed.weight int32"),
    (_poison(float("nan")), "1 tensor NaN or infinite: layers.1.ffn.up_proj.weight"),
    (_poison(float("-inf")), "1 tensor NaN or infinite: layers.1.ffn.up_proj.weight"),
]


@pytest.mark.parametrize(("plant", "message"), FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_faults_are_named(make_model: Callable, make_params: Callable, plant: Any, message: str, dtype: str) -> None:
    cfg = make_model(layer_loop="scan")
    tensors = dict(to_torch(make_params(cfg, dtype), cfg))
    plant(tensors)
    with pytest.raises(UserError) as caught:
        from_torch(tensors, cfg, "folder")
    assert caught.value.message.startswith("folder: ")
    assert message in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_stack_takes_a_dtype_that_holds_all_layers(make_model: Callable, make_params: Callable) -> None:
    wide = np.linspace(1, 2, 16)
    for loop in ("scan", "unroll"):
        cfg = make_model(layer_loop=loop)
        tensors = dict(to_torch(make_params(cfg, "bfloat16"), cfg))
        tensors["layers.1.ffn_norm.weight"] = wide
        back = dict(to_torch(from_torch(tensors, cfg, "folder"), cfg))
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(back[name].astype(np.float64), tensor.astype(np.float64))


def test_only_layers_that_are_there_are_widened(
    make_model: Callable, make_params: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cast of memory that is not written yet warns, where it happens to hold a signalling NaN."""
    cfg = make_model(layer_loop="scan")
    tensors = dict(to_torch(make_params(cfg, "float32"), cfg))
    tensors["layers.1.ffn_norm.weight"] = np.linspace(1, 2, 16)
    empty = np.empty

    def used_before(*args: Any, **options: Any) -> np.ndarray:
        memory = empty(*args, **options)
        memory.reshape(-1).view(np.uint8)[:] = np.resize(np.array([0x7F800001], "<u4").view(np.uint8), memory.nbytes)
        return memory

    monkeypatch.setattr(np, "empty", used_before)
    back = dict(to_torch(from_torch(tensors, cfg, "folder"), cfg))
    np.testing.assert_array_equal(back["layers.1.ffn_norm.weight"], np.linspace(1, 2, 16))


def test_all_faults_of_names_and_shapes_in_one_line(make_model: Callable, make_params: Callable) -> None:
    cfg = make_model()
    tensors = dict(to_torch(make_params(cfg), cfg))
    for name in [name for name in tensors if name.startswith("layers.2.")]:
        del tensors[name]
    tensors["extra.weight"] = np.zeros(1)
    with pytest.raises(UserError) as caught:
        from_torch(tensors, cfg)
    assert caught.value.message == (
        "tensors: 9 tensors missing: layers.2.ffn.down_proj.weight, layers.2.ffn.gate_proj.weight, "
        "layers.2.ffn.up_proj.weight, ...; 1 tensor not expected: extra.weight"
    )


def test_a_tree_of_another_config_is_refused(make_model: Callable, make_params: Callable) -> None:
    params = make_params(make_model(layer_loop="unroll"))
    with pytest.raises(UserError, match=r"missing: head.kernel"):
        list(to_torch(params, make_model(tie_embeddings=False, layer_loop="unroll")))
    with pytest.raises(UserError, match=r"not expected: layers_3"):
        list(to_torch(params, make_model(n_layers=3, layer_loop="unroll")))
    with pytest.raises(UserError, match=r"another shape: layers_0.ffn.down_proj.kernel \[24, 16\] for \[40, 16\]"):
        list(to_torch(params, make_model(d_ff=40, layer_loop="unroll")))


def test_a_deep_model_is_named_without_tracing_each_layer(make_model: Callable) -> None:
    cfg: config.Model = make_model(n_layers=200, layer_loop="unroll")
    assert len(names.leaves(cfg)) == 2 + 9 * 200
