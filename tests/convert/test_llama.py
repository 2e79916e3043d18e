"""The public Llama layout: rows, their derived inverse, and config.json both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxlm import config
from jaxlm.convert.canonical import Leaf, leaves
from jaxlm.convert.families import llama
from jaxlm.convert.rows import Row, expand, from_layout, matrix, pairs_to_halves, to_layout
from jaxlm.errors import UserError

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False, "n_kv_heads": 4},
    {"biases": ("qkv", "attention_out")},
    {"biases": ("qkv", "attention_out", "mlp"), "rope_layout": "interleaved", "head_dim": 6},
    {"biases": ("mlp",), "pattern": ("attention+mlp",) * 2, "n_kv_heads": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_round_trip(
    make_model: Callable, make_params: Callable, same: Callable, options: dict, loop: str, dtype: str
) -> None:
    cfg = make_model(layer_loop=loop, **options)
    params = make_params(cfg, dtype)
    tensors = dict(to_layout(params, cfg, llama.rows(cfg)))
    assert len(tensors) == len(leaves(cfg))
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    back = from_layout(tensors, cfg, llama.rows(cfg))
    same(back, params)
    again = dict(to_layout(back, cfg, llama.rows(cfg)))
    same(again, tensors)


@pytest.mark.parametrize("options", OPTIONS)
def test_config_round_trip(make_model: Callable, options: dict) -> None:
    cfg = make_model(norm_eps=1e-6, rope_theta=5e5, **options)
    back = llama.FAMILY.config_from_hf(llama.FAMILY.config_to_hf(cfg, dtype="float32"))
    for key in ("pattern", "layer_loop"):
        assert key not in llama.FAMILY.config_to_hf(cfg, dtype="float32")
    assert back == config.Model(
        **{name: getattr(cfg, name) for name in cfg.__dataclass_fields__ if name not in ("pattern", "layer_loop")}
    )


def test_pairs_to_halves() -> None:
    leaf = Leaf((2, 6), ("heads", "head_dim"))
    x = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(pairs_to_halves.out(x, leaf), x[:, [0, 2, 4, 1, 3, 5]])
    np.testing.assert_array_equal(pairs_to_halves.back(pairs_to_halves.out(x, leaf), leaf), x)


def test_only_queries_and_keys_are_reordered(make_model: Callable, make_params: Callable) -> None:
    biases = ("qkv", "attention_out", "mlp")
    pairs, halves = make_model(rope_layout="interleaved", biases=biases), make_model(biases=biases)
    params = make_params(pairs)
    a = dict(to_layout(params, pairs, llama.rows(pairs)))
    b = dict(to_layout(params, halves, llama.rows(halves)))
    moved = {name.partition("self_attn.")[2] for name in a if not np.array_equal(a[name], b[name])}
    assert moved == {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"norm": "layernorm"}, "model.norm = 'layernorm'"),
    ({"norm_position": "post"}, "model.norm_position = 'post'"),
    ({"final_norm": False}, "model.final_norm = False"),
    ({"qk_norm": True}, "model.qk_norm = True"),
    ({"positions": "learned"}, "model.positions = 'learned'"),
    ({"positions": "sinusoidal"}, "model.positions = 'sinusoidal'"),
    ({"positions": "none"}, "model.positions = 'none'"),
    ({"activation": "relu"}, "model.activation = 'relu'"),
    ({"activation": "gelu"}, "model.activation = 'gelu'"),
    ({"activation": "swiglu_clamped"}, "model.activation = 'swiglu_clamped'"),
    ({"rotary_fraction": 0.5}, "model.rotary_fraction = 0.5"),
    ({"rope_scaling": config.RopeScaling(kind="linear", factor=2.0)}, "[model.rope_scaling]"),
    ({"window": 8}, "model.window = 8"),
    ({"sink_logits": True}, "model.sink_logits = True"),
    ({"sink_tokens": 2}, "model.sink_tokens = 2"),
    ({"softcap": 5.0}, "model.softcap = 5.0"),
    ({"pattern": ("attention(window=8)+mlp",)}, "model.pattern = ['attention(window=8)+mlp']"),
    ({"pattern": ("mamba",)}, "model.pattern = ['mamba']"),
    ({"biases": ("head",), "tie_embeddings": False}, "'head' in model.biases"),
    ({"biases": ("qkv",)}, "model.biases = ['qkv']"),
    ({"biases": ("attention_out", "mlp")}, "model.biases = ['attention_out', 'mlp']"),
    ({"d_model": 18, "head_dim": 4}, "model.n_heads = 4 with model.d_model = 18"),
]


@pytest.mark.parametrize(("options", "what"), REFUSED)
def test_what_the_layout_cannot_express(make_model: Callable, options: dict, what: str) -> None:
    with pytest.raises(UserError) as caught:
        llama.FAMILY.config_to_hf(make_model(**options), dtype="float32")
    assert caught.value.message == f"the llama layout has no place for {what}"
    assert caught.value.hint


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters = 'llama3'"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ({"rope_parameters": "default"}, "rope_parameters and rope_scaling are objects or null"),
    ({"hidden_size": None}, "model.d_model = None"),
    ({"num_attention_heads": 3}, "model.n_kv_heads = 2 does not divide model.n_heads = 3"),
]


@pytest.mark.parametrize(("change", "what"), FOREIGN)
def test_what_jaxlm_cannot_express(make_model: Callable, change: dict, what: str) -> None:
    hf = {**llama.FAMILY.config_to_hf(make_model(), dtype="float32"), **change}
    with pytest.raises(UserError) as caught:
        llama.FAMILY.config_from_hf(hf, "here/config.json")
    assert caught.value.message.startswith("here/config.json: ")
    assert what in caught.value.message


def test_a_missing_size_is_named(make_model: Callable) -> None:
    hf = llama.FAMILY.config_to_hf(make_model(), dtype="float32")
    del hf["intermediate_size"]
    with pytest.raises(UserError, match=r"config.json: intermediate_size is missing"):
        llama.FAMILY.config_from_hf(hf)


def test_an_old_config_has_the_defaults_of_transformers() -> None:
    sizes = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    cfg = llama.FAMILY.config_from_hf(sizes | {"rope_theta": 5e5, "rope_scaling": None, "head_dim": None})
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.rope_theta, cfg.norm_eps) == (4, 16, 5e5, 1e-6)
    assert (cfg.tie_embeddings, cfg.biases, cfg.max_seq_len, cfg.rope_layout) == (False, (), 2048, "half")


def test_extras(make_model: Callable, make_params: Callable) -> None:
    cfg = make_model()
    tensors = dict(to_layout(make_params(cfg), cfg, llama.rows(cfg)))
    constant = "model.layers.1.self_attn.rotary_emb.inv_freq"
    tensors |= {constant: np.ones(2), "lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert llama.FAMILY.extras(tensors, cfg) == {constant, "lm_head.weight"}
    assert llama.FAMILY.extras(tensors, make_model(tie_embeddings=False)) == {constant}
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        llama.FAMILY.extras(tensors, cfg)


def test_a_table_with_a_hole_or_a_clash_is_noticed(make_model: Callable) -> None:
    cfg = make_model()
    rows = llama.rows(cfg)
    with pytest.raises(UserError, match=r"no place for 4 parameters, such as layers.0.ffn.up_proj.kernel"):
        expand([row for row in rows if "up_proj" not in row.ours], cfg)
    clash = Row("layers.{i}.ffn.up_proj.kernel", "model.layers.{i}.mlp.gate_proj.weight", matrix)
    with pytest.raises(ValueError, match="two rows share a name"):
        expand([*(row for row in rows if row.ours != clash.ours), clash], cfg)
