"""The families with experts: rows both ways, config.json both ways, the published models by their counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config.model_parts import MoE, RopeScaling
from jaxlm.convert.canonical import Leaf, leaves
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.open_model import open_model
from jaxlm.convert.rows import Row, each, expand, flat, from_layout, interleave, matrix, plain, to_layout
from jaxlm.convert.settings import function_of
from jaxlm.counts.parameters import parameters
from jaxlm.errors import UserError

YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=8, truncate=False)
EXPERTS = MoE(n_experts=6, top_k=2, d_ff=10)
DEEPSEEK = MoE(
    n_experts=6,
    top_k=2,
    d_ff=10,
    n_shared=2,
    router="sigmoid",
    n_groups=3,
    top_groups=2,
    route_scale=2.5,
    selection_bias=True,
)
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"pattern": ("attention+moe",), "moe": EXPERTS, "window": 7, "rope_layout": "interleaved"},
    "qwen3_moe": {"pattern": ("attention+mlp", "attention+moe"), "moe": EXPERTS, "qk_norm": True, "window": 7},
    "gpt_oss": {
        "pattern": ("attention(window=7)+moe", "attention+moe"),
        "moe": EXPERTS,
        "activation": "swiglu_clamped",
        "biases": ("qkv", "attention_out", "router", "experts"),
        "sink_logits": True,
        "rope_scaling": YARN,
    },
    "dots1": {
        "pattern": ("attention+mlp", *["attention(window=7)+moe"] * 3),
        "moe": DEEPSEEK,
        "qk_norm": True,
        "biases": ("qkv", "attention_out"),
    },
}
every_family = pytest.mark.parametrize("name", MODELS)


@every_family
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_rows_both_ways(name: str, loop: str, make_model: Callable, make_params: Callable, same: Callable) -> None:
    cfg = make_model(layer_loop=loop, tie_embeddings=loop == "scan", **MODELS[name])
    rows = FAMILIES[name].rows(cfg)
    params = make_params(cfg, "float16")
    tensors = dict(to_layout(params, cfg, rows))
    same(from_layout(tensors, cfg, rows), params)
    assert sum(x.size for x in tensors.values()) == sum(np.prod(leaf.shape) for leaf in leaves(cfg).values())


@every_family
def test_config_both_ways(name: str, make_model: Callable) -> None:
    cfg = make_model(**MODELS[name])
    hf = FAMILIES[name].config_to_hf(cfg, dtype="bfloat16")
    back = FAMILIES[name].config_from_hf(json.loads(json.dumps(hf)))
    assert function_of(back) == function_of(cfg)
    assert back.rope_layout == cfg.rope_layout
    again = FAMILIES[name].config_to_hf(back, dtype="bfloat16")
    assert again == hf


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    count=st.integers(2, 3),
    seed=st.integers(0, 99),
)
def test_interleave_and_each_are_bijections(shape: tuple[int, int, int], count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal(shape).astype(np.float32) for _ in range(count)]
    leaf = Leaf(shape, ("experts", "embed", "mlp"))
    names = tuple(f"ours{i}" for i in range(count))
    row = Row(names, "theirs", plain, interleave)
    (joined,) = row.out(kernels, [leaf] * count)
    assert joined.shape == (*shape[:2], count * shape[2]) == row.shapes([leaf] * count)[0]
    for i in range(count):
        np.testing.assert_array_equal(joined[..., i::count], kernels[i])
    for mine, back in zip(kernels, row.back([joined], [leaf] * count), strict=True):
        np.testing.assert_array_equal(mine, back)
    one = Row("ours", "theirs.{e}", matrix, each).of_experts(shape[0])
    split = one.out(kernels[:1], [leaf])
    assert one.theirs == tuple(f"theirs.{e}" for e in range(shape[0]))
    for expert, weight in enumerate(split):
        np.testing.assert_array_equal(weight, kernels[0][expert].T)
    np.testing.assert_array_equal(one.back(split, [leaf])[0], kernels[0])
    bias = Leaf((shape[0], shape[2]), ("experts", "mlp"))
    biases = [kernel[:, 0] for kernel in kernels]
    (turns,) = Row(names, "theirs", flat, interleave).out(biases, [bias] * count)
    np.testing.assert_array_equal(turns.reshape(shape[0], shape[2], count), np.stack(biases, -1))


def test_a_tensor_of_an_expert_that_is_missing_is_named(make_model: Callable, make_params: Callable) -> None:
    cfg = make_model(**MODELS["mixtral"])
    rows = FAMILIES["mixtral"].rows(cfg)
    tensors = dict(to_layout(make_params(cfg), cfg, rows))
    del tensors["model.layers.2.block_sparse_moe.experts.5.w2.weight"]
    tensors["model.layers.2.block_sparse_moe.experts.6.w2.weight"] = np.ones((16, 10), np.float32)
    with pytest.raises(UserError, match=r"1 tensor missing: .*experts\.5\.w2.*1 tensor not expected: .*experts\.6\.w2"):
        from_layout(tensors, cfg, rows)


def test_options_of_a_block_are_those_of_the_model(make_model: Callable) -> None:
    """Where all blocks with experts agree, it makes no difference where their options are written."""
    inside = make_model(pattern=("attention+moe(n_experts=4, top_k=3, d_ff=12)",), moe=EXPERTS)
    hf = FAMILIES["mixtral"].config_to_hf(inside, dtype="float32")
    assert (hf["num_local_experts"], hf["num_experts_per_tok"], hf["intermediate_size"]) == (4, 3, 12)
    outside = FAMILIES["mixtral"].config_from_hf(hf)
    assert function_of(outside) == function_of(inside)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"moe": MoE(renormalize=False)}, "model.moe.renormalize = False"),
    ("mixtral", {"moe": MoE(n_shared=1)}, "model.moe.n_shared = 1"),
    ("mixtral", {"moe": MoE(capacity_factor=1.5)}, "model.moe.capacity_factor = 1.5"),
    ("mixtral", {"pattern": ("attention+mlp", "attention+moe")}, "model.pattern = "),
    ("mixtral", {"pattern": ("attention(window=7)+moe", "attention+moe"), "window": 0}, "model.window = 0 of layer 1"),
    (
        "mixtral",
        {"pattern": ("attention+moe", "attention+moe(top_k=1)"), "window": 0},
        "model.moe.top_k = 1 of layer 1",
    ),
    ("mixtral", {"biases": ("qkv",)}, "model.biases = ['qkv']"),
    ("mixtral", {"moe": MoE(selection_bias=True)}, "model.moe.selection_bias = True"),
    ("qwen3_moe", {"qk_norm": False}, "model.qk_norm = False"),
    ("qwen3_moe", {"moe": MoE(route_scale=2.0)}, "model.moe.route_scale = 2.0"),
    ("gpt_oss", {"activation": "swiglu"}, "model.activation = 'swiglu'"),
    ("gpt_oss", {"sink_logits": False}, "model.sink_logits = False"),
    ("gpt_oss", {"biases": ("qkv", "attention_out", "router")}, "model.biases = ['qkv', 'attention_out', 'router']"),
    ("gpt_oss", {"pattern": ("attention(window=7)+moe", "attention(window=9)+moe")}, "model.window = 7"),
    ("dots1", {"moe": MoE(router="sigmoid", n_shared=1)}, "model.moe.selection_bias = False"),
    ("dots1", {"moe": MoE(router="sigmoid", selection_bias=True)}, "n_shared_experts = 0"),
    ("dots1", {"pattern": ("attention+moe", "attention+mlp")}, "model.pattern = "),
]


@pytest.mark.parametrize(("name", "options", "what"), REFUSED)
def test_what_the_layout_cannot_express(name: str, options: dict, what: str, make_model: Callable) -> None:
    with pytest.raises(UserError) as caught:
        FAMILIES[name].config_to_hf(make_model(**MODELS[name] | options), dtype="float32")
    assert caught.value.message.startswith(f"the {name} layout has no place for")
    assert what in caught.value.message


def test_a_noisy_router_has_no_place(make_model: Callable) -> None:
    """Its noise has parameters, though they play no part once trained."""
    cfg = make_model(pattern=("attention+moe",), moe=MoE(noisy=True))
    with pytest.raises(UserError, match=r"no place for \d+ parameters, such as layers\.0\.ffn\.router\.noise"):
        expand(FAMILIES["mixtral"].rows(cfg), cfg)


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FOREIGN: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_oss", {"swiglu_limit": 8.0}, "swiglu_limit = 8.0"),
    ("gpt_oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers = 4"),
    ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "layer_types = 'chunked_attention'"),
    ("gpt_oss", {"sliding_window": None}, "layer_types has sliding_attention, but sliding_window is null"),
    ("gpt_oss", {"quantization_config": MXFP4}, "quantised"),
    ("mixtral", {"sliding_window": 0}, "sliding_window = 0"),
    ("mixtral", {"num_experts_per_tok": 9}, "model.moe.top_k = 9 is more than model.moe.n_experts = 6"),
    ("qwen3_moe", {"num_experts": 4}, "num_experts = 4, but num_local_experts = 6"),
    ("dots1", {"n_routed_experts": None}, "n_routed_experts is missing"),
    ("dots1", {"n_shared_experts": None}, "n_shared_experts is missing"),
    ("dots1", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
    ("dots1", {"first_k_dense_replace": "one"}, "first_k_dense_replace = 'one'"),
]


@pytest.mark.parametrize(("name", "change", "what"), FOREIGN)
def test_what_jaxlm_cannot_express(name: str, change: dict, what: str, make_model: Callable) -> None:
    hf = {**FAMILIES[name].config_to_hf(make_model(**MODELS[name]), dtype="float32"), **change}
    with pytest.raises(UserError) as caught:
        FAMILIES[name].config_from_hf(hf, "here/config.json")
    assert caught.value.message.startswith("here/config.json: ")
    assert what in caught.value.message
    if "quantization_config" in change:
        assert "Mxfp4Config(dequantize=True)" in caught.value.hint


def test_deepseek_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(UserError, match=r"model_type 'deepseek_v3': its attention keeps a latent .* \(MLA\)"):
        open_model(tmp_path)


MIXTRAL_8X7B = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GPT_OSS_20B = {
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
DOTS_LLM1 = {
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 62,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any], float, float, bool]] = {
    "Mixtral-8x7B": ("mixtral", MIXTRAL_8X7B, 46.7, 12.9, True),
    "Qwen3-30B-A3B": ("qwen3_moe", QWEN3_30B_A3B, 30.5, 3.35, True),
    "gpt-oss-20b": ("gpt_oss", GPT_OSS_20B, 20.9, 3.6, False),  # OpenAI counts no embedding as active
    "dots.llm1": ("dots1", DOTS_LLM1, 142.8, 14.0, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    family, hf, billions, active_billions, with_embedding = PUBLISHED[name]
    cfg = FAMILIES[family].config_from_hf(hf)
    assert capsys.readouterr().err == ""  # every key is known
    total, active = parameters(cfg)
    if not with_embedding:
        active -= cfg.vocab_size * cfg.d_model
    assert total / 1e9 == pytest.approx(billions, abs=0.05)
    assert active / 1e9 == pytest.approx(active_billions, abs=0.05)
    back = FAMILIES[family].config_to_hf(cfg, dtype="bfloat16")
    inert = {"router_aux_loss_coef", "max_window_layers", "experts_per_token", "initial_context_length", "scoring_func"}
    assert {key: back.get(key) for key in hf.keys() - inert} == {key: hf[key] for key in hf.keys() - inert}


def test_defaults_are_those_of_transformers() -> None:
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 32}
    mixtral = FAMILIES["mixtral"].config_from_hf(sizes | {"intermediate_size": 48})
    assert (mixtral.n_kv_heads, mixtral.rope_theta, mixtral.moe.n_experts, mixtral.window) == (8, 1e6, 8, 0)
    qwen = FAMILIES["qwen3_moe"].config_from_hf(sizes | {"intermediate_size": 48, "sliding_window": 9})
    assert (qwen.n_kv_heads, qwen.moe.n_experts, qwen.moe.renormalize, qwen.window) == (4, 128, False, 0)
    gpt_oss = FAMILIES["gpt_oss"].config_from_hf(sizes | {"intermediate_size": 48})
    assert gpt_oss.pattern == ("attention(window=128)+moe", "attention+moe")
    assert gpt_oss.rope_scaling == RopeScaling(kind="yarn", factor=32.0, original_max_seq_len=4096, truncate=False)
    assert (gpt_oss.head_dim, gpt_oss.rope_theta, gpt_oss.moe.n_experts) == (64, 150000.0, 128)
    needed = {"intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
    dots1 = FAMILIES["dots1"].config_from_hf(sizes | needed | {"max_window_layers": 3})
    assert dots1.pattern == (*["attention+moe"] * 3, "attention(window=4096)+moe")
    assert (dots1.moe.d_ff, dots1.moe.renormalize, dots1.n_kv_heads) == (1408, False, 32)
