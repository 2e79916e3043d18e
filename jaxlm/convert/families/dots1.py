"""The layout of Hugging Face's Dots1ForCausalLM (dots.llm1): the experts of DeepSeek-V3 behind the attention of Qwen3.

Scores are sigmoids, a bias takes part in the choice alone, a token chooses among its best groups, and every token
passes the shared experts. The bias stays float32 in transformers whatever the dtype of the other weights.
"""

from __future__ import annotations

from typing import Any

from jaxlm import config
from jaxlm.convert.families.experts import (
    FIRST_DENSE,
    decoder_settings,
    expert_rows,
    layer_types,
    pattern,
    routed,
    width,
)
from jaxlm.convert.families.llama import HEAD_DIM, SILU, attention_rows, mlp_rows, outer_rows, rope
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, matrix
from jaxlm.convert.settings import Hf, always, biases, fixed, inert


def rows(cfg: config.Model) -> list[Row]:
    """Llama's with norms of queries and keys, and experts behind the first layers."""
    ours, theirs = "layers.{i}.ffn", "model.layers.{i}.mlp"
    return [
        *outer_rows(),
        *attention_rows(cfg),
        *mlp_rows(),
        Row(f"{ours}.router.kernel", f"{theirs}.gate.weight", matrix),
        Row(f"{ours}.router.selection_bias", f"{theirs}.gate.e_score_correction_bias"),
        *expert_rows(theirs),
        *mlp_rows(f"{ours}.shared", f"{theirs}.shared_experts"),
    ]


_SHARED = routed("n_shared_experts", "moe.n_shared")


def _shared_back(hf: Hf) -> dict[str, Any]:
    """The number of shared experts, of which there is one at least."""
    if hf.get(_SHARED.name) == 0:
        raise ValueError(f"{_SHARED.name} = 0, but every layer with experts has shared ones")
    return _SHARED.back(hf)


def _last_slide(hf: Hf) -> list[str]:
    slide = hf["num_hidden_layers"] if hf.get("sliding_window", 4096) is None else hf.get("max_window_layers", 62)
    return ["full_attention" if i < slide else "sliding_attention" for i in range(hf["num_hidden_layers"])]


FAMILY = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    rows=rows,
    settings=(
        *decoder_settings(kv_heads=32, max_seq_len=2048, norm_eps=1e-6),
        HEAD_DIM,
        SILU,
        rope(),
        biases("attention_bias", ("qkv", "attention_out")),
        always("qk_norm", True),
        pattern(layer_types(_last_slide, 4096), FIRST_DENSE),
        *sizes(intermediate_size="d_ff"),
        width("moe_intermediate_size", "moe.d_ff", 1408),
        routed("n_routed_experts", "moe.n_experts"),
        routed("num_experts_per_tok", "moe.top_k"),
        _SHARED._replace(back=_shared_back),
        routed("n_group", "moe.n_groups", 1),
        routed("topk_group", "moe.top_groups", 1),
        routed("norm_topk_prob", "moe.renormalize", False),
        routed("routed_scaling_factor", "moe.route_scale", 1.0),
        inert("max_window_layers"),
        always("moe.router", "sigmoid"),
        always("moe.selection_bias", True),
        fixed("scoring_func", None, ("sigmoid", "noaux_tc")),
        fixed("topk_method", None, ("noaux_tc",)),
        fixed("moe_layer_freq", None, (1,)),
    ),
    inert=("max_window_layers",),  # layer_types says it
)
