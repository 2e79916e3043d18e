"""The public layouts of dense models: rows, their derived inverse, and config.json both ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxlm import config
from jaxlm.convert.canonical import Leaf, leaves
from jaxlm.convert.families import FAMILIES, gpt2, llama
from jaxlm.convert.rows import Row, expand, from_layout, matrix, pairs_to_halves, to_layout
from jaxlm.convert.settings import function_of
from jaxlm.convert.write_model import resolve
from jaxlm.errors import UserError

GPT2 = {"norm": "layernorm", "positions": "learned", "activation": "gelu_tanh", "n_kv_heads": 4}
GPT2 |= {"biases": ("qkv", "attention_out", "mlp")}
BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"window": 8},
    "qwen2": {"biases": ("qkv",)},
    "qwen3": {"qk_norm": True},
    "gpt2": GPT2,
}
"""A model that only this family can hold."""
YARN = config.RopeScaling(kind="yarn", original_max_seq_len=16)
LLAMA3 = config.RopeScaling(kind="llama3", factor=2.0, original_max_seq_len=16, high_freq_factor=3.0)
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_embeddings": False, "n_kv_heads": 4}),
    ("llama", {"biases": ("qkv", "attention_out"), "rope_scaling": YARN}),
    ("llama", {"biases": ("qkv", "attention_out", "mlp"), "rope_layout": "interleaved", "head_dim": 6}),
    ("llama", {"biases": ("mlp",), "pattern": ("attention+mlp",) * 2, "n_kv_heads": 1, "rope_scaling": LLAMA3}),
    ("mistral", {"pattern": ("attention(window=8)+mlp",)}),
    ("qwen2", {"biases": ("qkv",), "pattern": ("attention+mlp", "attention(window=8)+mlp")}),
    ("qwen3", {"qk_norm": True, "head_dim": 6, "rope_layout": "interleaved"}),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "tie_embeddings": False, "activation": "relu", "d_ff": 64}),
]


@pytest.mark.parametrize(("family", "options"), OPTIONS)
@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_round_trip(
    make_model: Callable, make_params: Callable, same: Callable, family: str, options: dict, loop: str, dtype: str
) -> None:
    cfg = make_model(layer_loop=loop, **options)
    rows = FAMILIES[family].rows(cfg)
    params = make_params(cfg, dtype)
    tensors = dict(to_layout(params, cfg, rows))
    assert {tensor.dtype.name for tensor in tensors.values()} == {dtype}
    assert sum(tensor.size for tensor in tensors.values()) == sum(np.prod(leaf.shape) for leaf in leaves(cfg).values())
    back = from_layout(tensors, cfg, rows)
    same(back, params)
    same(dict(to_layout(back, cfg, rows)), tensors)


@pytest.mark.parametrize(("family", "options"), OPTIONS)
def test_config_round_trip(make_model: Callable, family: str, options: dict) -> None:
    cfg = make_model(norm_eps=1e-6, rope_theta=5e5, **options)
    hf = FAMILIES[family].config_to_hf(cfg, dtype="float32")
    back = FAMILIES[family].config_from_hf(hf)
    assert function_of(back) == function_of(cfg)
    assert (back.rope_layout, back.max_seq_len, back.init_std) == (cfg.rope_layout, cfg.max_seq_len, cfg.init_std)
    assert FAMILIES[family].config_to_hf(back, dtype="float32") == hf


def test_pairs_to_halves() -> None:
    leaf = [Leaf((2, 6), ("heads", "head_dim"))]
    x = np.arange(12).reshape(2, 6)
    there = pairs_to_halves.out([x], leaf)
    np.testing.assert_array_equal(there[0], x[:, [0, 2, 4, 1, 3, 5]])
    np.testing.assert_array_equal(pairs_to_halves.back(there, leaf, [x])[0], x)


def test_only_queries_and_keys_are_reordered(make_model: Callable, make_params: Callable) -> None:
    biases = ("qkv", "attention_out", "mlp")
    pairs, halves = make_model(rope_layout="interleaved", biases=biases), make_model(biases=biases)
    params = make_params(pairs)
    a = dict(to_layout(params, pairs, llama.rows(pairs)))
    b = dict(to_layout(params, halves, llama.rows(halves)))
    moved = {name.partition("self_attn.")[2] for name in a if not np.array_equal(a[name], b[name])}
    assert moved == {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"}


def test_gpt2_holds_queries_keys_and_values_in_one(make_model: Callable, make_params: Callable) -> None:
    cfg = make_model(**GPT2, layer_loop="unroll")
    params = make_params(cfg)
    tensors = dict(to_layout(params, cfg, gpt2.rows(cfg)))
    mixer = params["layers_1"]["mixer"]
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        part = slice(16 * number, 16 * (number + 1))
        kernel = tensors["transformer.h.1.attn.c_attn.weight"][:, part]
        np.testing.assert_array_equal(kernel, mixer[name]["kernel"].reshape(16, 16))
        np.testing.assert_array_equal(tensors["transformer.h.1.attn.c_attn.bias"][part], mixer[name]["bias"].ravel())
    np.testing.assert_array_equal(
        tensors["transformer.h.1.mlp.c_fc.weight"], params["layers_1"]["ffn"]["up_proj"]["kernel"]
    )


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"norm": "layernorm"}, "model.norm = 'layernorm'"),
    ("llama", {"norm_position": "post"}, "model.norm_position = 'post'"),
    ("llama", {"final_norm": False}, "model.final_norm = False"),
    ("llama", {"qk_norm": True}, "model.qk_norm = True"),
    ("llama", {"positions": "learned"}, "model.positions = 'learned'"),
    ("llama", {"positions": "sinusoidal"}, "model.positions = 'sinusoidal'"),
    ("llama", {"positions": "none"}, "model.positions = 'none'"),
    ("llama", {"activation": "relu"}, "model.activation = 'relu'"),
    ("llama", {"activation": "gelu"}, "model.activation = 'gelu'"),
    ("llama", {"activation": "swiglu_clamped"}, "model.activation = 'swiglu_clamped'"),
    ("llama", {"rotary_fraction": 0.5}, "model.rotary_fraction = 0.5"),
    ("llama", {"rope_scaling": config.RopeScaling(kind="ntk", factor=2.0)}, "model.rope_scaling.kind = 'ntk'"),
    ("llama", {"window": 8}, "model.window = 8"),
    ("llama", {"sink_logits": True}, "model.sink_logits = True"),
    ("llama", {"sink_tokens": 2}, "model.sink_tokens = 2"),
    ("llama", {"softcap": 5.0}, "model.softcap = 5.0"),
    ("llama", {"pattern": ("attention(window=8)+mlp",)}, "model.window = 8"),
    ("llama", {"pattern": ("attention+mlp", "attention(rope_theta=9.0)+mlp")}, "model.rope_theta = 9.0 of layer 1"),
    ("llama", {"pattern": ("mamba",)}, "model.pattern = ['mamba']"),
    ("llama", {"biases": ("head",), "tie_embeddings": False}, "model.biases = ['head']"),
    ("llama", {"biases": ("qkv",)}, "model.biases = ['qkv']"),
    ("llama", {"biases": ("attention_out", "mlp")}, "model.biases = ['attention_out', 'mlp']"),
    (
        "llama",
        {"d_model": 18, "head_dim": 4},
        "this model: its config.json: hidden_size = 18 is no multiple of num_attention_heads = 4",
    ),
    ("mistral", {"biases": ("mlp",)}, "model.biases = ['mlp']"),
    ("mistral", {"window": 8, "keep_first": 2}, "model.keep_first = 2"),
    ("mistral", {"pattern": ("attention(window=8)+mlp", "attention+mlp")}, "model.window = 0 of layer 1"),
    ("qwen2", {}, "model.biases = []"),
    ("qwen2", {"biases": ("qkv", "attention_out")}, "model.biases = ['qkv', 'attention_out']"),
    (
        "qwen2",
        {"biases": ("qkv",), "pattern": ("attention(window=8)+mlp", "attention(window=6)+mlp")},
        "model.window = 6 of layer 1",
    ),
    ("qwen3", {}, "model.qk_norm = False"),
    ("gpt2", {}, "model.norm = 'rmsnorm'"),
    ("gpt2", {**GPT2, "n_kv_heads": 2}, "model.n_kv_heads = 2"),
    ("gpt2", {**GPT2, "head_dim": 6}, "model.head_dim = 6"),
    ("gpt2", {**GPT2, "positions": "rope"}, "model.positions = 'rope'"),
]


@pytest.mark.parametrize(("family", "options", "what"), REFUSED)
def test_what_the_layout_cannot_express(make_model: Callable, family: str, options: dict, what: str) -> None:
    with pytest.raises(UserError) as caught:
        FAMILIES[family].config_to_hf(make_model(**options), dtype="float32")
    assert caught.value.message == f"the {family} layout has no place for {what}"


@pytest.mark.parametrize("family", BASES)
def test_hf_is_the_first_family_that_can_hold_a_model(
    make_model: Callable, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve("hf", make_model(**BASES[family])) == family
    assert capsys.readouterr().err == f"--to hf: {family} can hold this model\n"


def test_a_model_that_no_family_can_hold(make_model: Callable) -> None:
    with pytest.raises(UserError) as caught:
        resolve("hf", make_model(positions="sinusoidal"))
    assert caught.value.message == "--to hf: no public layout can hold this model"
    assert "llama: model.positions = 'sinusoidal'" in caught.value.hint and "--to torch" in caught.value.hint


FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope_type = 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_parameters.factor = 0"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 2.0}}, "rope_parameters.mscale = 2.0"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters.mrope_section = [1]"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "model.rope_scaling.factor = '2'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_scaling": None}, "= 0.5"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ("llama", {"rope_parameters": "default"}, "rope_parameters and rope_scaling are objects or null"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"hidden_size": "16"}, "ill-formed: hidden_size = '16', num_attention_heads = 4"),
    ("llama", {"num_attention_heads": 3}, "hidden_size = 16 is no multiple of num_attention_heads = 3"),
    ("mistral", {"num_attention_heads": 3}, "model.n_kv_heads = 2 does not divide model.n_heads = 3"),
    ("mistral", {"sliding_window": "8"}, "ill-formed: sliding_window = '8'"),
    ("qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types = ['linear_attention'"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types = ['full_attention'] is"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window that is used"),
    ("gpt2", {"activation_function": "gelu_fast"}, "activation_function = 'gelu_fast'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
]


@pytest.mark.parametrize(("family", "change", "what"), FOREIGN)
def test_what_jaxlm_cannot_express(make_model: Callable, family: str, change: dict, what: str) -> None:
    hf = {**FAMILIES[family].config_to_hf(make_model(**BASES[family]), dtype="float32"), **change}
    with pytest.raises(UserError) as caught:
        FAMILIES[family].config_from_hf(hf, "here/config.json")
    assert caught.value.message.startswith("here/config.json: ")
    assert what in caught.value.message


def test_a_missing_size_is_named(make_model: Callable) -> None:
    hf = llama.FAMILY.config_to_hf(make_model(), dtype="float32")
    del hf["intermediate_size"]
    with pytest.raises(UserError, match=r"config.json: intermediate_size is missing"):
        llama.FAMILY.config_from_hf(hf)


SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DEFAULTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "llama",
        SIZES | {"rope_theta": 5e5, "rope_scaling": None, "head_dim": None},
        {"n_kv_heads": 4, "head_dim": 16, "rope_theta": 5e5, "norm_eps": 1e-6, "tie_embeddings": False, "biases": ()}
        | {"max_seq_len": 2048, "rope_layout": "half", "window": 0},
    ),
    (
        "llama",  # Llama 3.1
        SIZES
        | {"rope_theta": 5e5, "max_position_embeddings": 131072}
        | {"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}}
        | {"original_max_position_embeddings": 8192},
        {"rope_scaling": config.RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192)},
    ),
    ("mistral", SIZES, {"window": 4096, "max_seq_len": 131072, "rope_theta": 1e4}),
    ("mistral", SIZES | {"sliding_window": None, "rope_theta": 1e6}, {"window": 0, "rope_theta": 1e6}),
    (
        "qwen2",
        SIZES | {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 1},
        {"window": 0, "biases": ("qkv",), "max_seq_len": 32768, "norm_eps": 1e-6},
    ),
    (
        "qwen2",
        SIZES | {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
        {"pattern": ("attention+mlp", "attention(window=50)+mlp")},
    ),
    ("qwen3", SIZES, {"head_dim": 128, "qk_norm": True, "biases": (), "window": 0}),
    (
        "gpt2",
        {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_ctx": 1024},
        {"d_ff": 256, "max_seq_len": 1024, "activation": "gelu_tanh", "norm_eps": 1e-5, "tie_embeddings": True},
    ),
]


@pytest.mark.parametrize(("family", "hf", "wanted"), DEFAULTS)
def test_an_absent_key_has_the_default_of_transformers(
    family: str, hf: dict, wanted: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = FAMILIES[family].config_from_hf(hf)
    assert {name: getattr(cfg, name) for name in wanted} == wanted
    assert capsys.readouterr().err == ""


LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLIC: dict[str, tuple[str, int, dict[str, Any]]] = {
    "TinyLlama-1.1B": (
        "llama",
        1_100_048_384,
        {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
        | {"hidden_act": "silu", "attention_bias": False, "pretraining_tp": 1, "rope_scaling": None}
        | {"rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True},
    ),
    "Llama-3.1-8B": (
        "llama",
        8_030_261_248,
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
        | {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA_31}}
        | {"bos_token_id": 128000, "eos_token_id": [128001, 128008], "mlp_bias": False, "attention_dropout": 0.0},
    ),
    "Mistral-7B-v0.1": (
        "mistral",
        7_241_732_096,
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768}
        | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        494_032_768,
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768}
        | {"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False, "rope_theta": 1000000.0}
        | {"tie_word_embeddings": True, "use_mrope": False, "hidden_act": "silu", "rms_norm_eps": 1e-6},
    ),
    "Qwen3-0.6B": (
        "qwen3",
        596_049_920,
        {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
        | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1000000}
        | {"tie_word_embeddings": True, "attention_bias": False, "rope_scaling": None, "rms_norm_eps": 1e-6},
    ),
    "gpt2": (
        "gpt2",
        124_439_808,
        {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_ctx": 1024}
        | {"activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
        | {"layer_norm_epsilon": 1e-5, "summary_type": "cls_index", "initializer_range": 0.02}
        | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    ),
}
"""Family, published count of parameters, and the config.json as it is published."""


@pytest.mark.parametrize("name", PUBLIC)
def test_published_models_have_their_published_sizes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, count, hf = PUBLIC[name]
    cfg = FAMILIES[family].config_from_hf(hf)
    assert sum(math.prod(leaf.shape) for leaf in leaves(cfg).values()) == count
    assert capsys.readouterr().err == ""
    back = FAMILIES[family].config_from_hf(FAMILIES[family].config_to_hf(cfg, dtype="bfloat16"))
    assert function_of(back) == function_of(cfg)


def test_unknown_keys_are_told(make_model: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    hf = llama.FAMILY.config_to_hf(make_model(), dtype="float32")
    assert capsys.readouterr().err == ""
    llama.FAMILY.config_from_hf(
        hf | {"residual_multiplier": 2.0, "auto_map": {}, "_name_or_path": "x"}, "a/config.json"
    )
    assert capsys.readouterr().err == "a/config.json: unknown keys auto_map, residual_multiplier are ignored\n"


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


def test_names_without_their_first_part(make_model: Callable, make_params: Callable) -> None:
    """The public GPT-2: saved without its head, and with masks that transformers no longer stores."""
    cfg = make_model(**GPT2)
    full = dict(to_layout(make_params(cfg), cfg, gpt2.rows(cfg)))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in full.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 32, 32)), "h.1.attn.masked_bias": np.ones(())}
    found = gpt2.FAMILY.tensors(bare, cfg)
    assert found.keys() == full.keys()
    assert all(found[name] is full[name] and found.shape(name) == full[name].shape for name in full)
    assert found.dtype("transformer.wte.weight") == "float32"


def test_a_table_with_a_hole_or_a_clash_is_noticed(make_model: Callable) -> None:
    cfg = make_model()
    rows = llama.rows(cfg)
    up = "layers.{i}.ffn.up_proj.kernel"
    with pytest.raises(UserError, match=r"no place for 4 parameters, such as layers.0.ffn.up_proj.kernel"):
        expand([row for row in rows if up not in row.ours], cfg)
    clash = Row(up, "model.layers.{i}.mlp.gate_proj.weight", matrix)
    with pytest.raises(ValueError, match="two rows share a name"):
        expand([*(row for row in rows if row.ours != clash.ours), clash], cfg)
