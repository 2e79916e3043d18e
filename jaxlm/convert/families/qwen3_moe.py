"""The layout of Hugging Face's Qwen3MoeForCausalLM (Qwen3-30B-A3B, Qwen3-Coder): its rows, and its config.json."""

from __future__ import annotations

from typing import Any

from jaxlm import config
from jaxlm.convert.families.experts import (
    SPARSE_STEP,
    SWITCHED_WINDOW,
    decoder_settings,
    expert_rows,
    of_experts,
    pattern,
    routed,
    width,
)
from jaxlm.convert.families.llama import HEAD_DIM, SILU, attention_rows, mlp_rows, outer_rows, rope
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, matrix
from jaxlm.convert.settings import Hf, Setting, always, biases, inert


def rows(cfg: config.Model) -> list[Row]:
    """Llama's with norms of queries and keys, and experts in the layers that have them."""
    theirs = "model.layers.{i}.mlp"
    return [
        *outer_rows(),
        *attention_rows(cfg),
        *mlp_rows(),
        Row("layers.{i}.ffn.router.kernel", f"{theirs}.gate.weight", matrix),
        *expert_rows(theirs),
    ]


_COUNTS = ("num_experts", "num_local_experts")


def _count_back(hf: Hf) -> dict[str, Any]:
    counts = {hf[name] for name in _COUNTS if name in hf} or {128}
    if len(counts) > 1:
        raise ValueError(f"num_experts = {hf['num_experts']}, but num_local_experts = {hf['num_local_experts']}")
    return {"moe.n_experts": counts.pop()}


COUNT = Setting(lambda model: dict.fromkeys(_COUNTS, of_experts(model).moe.n_experts), _count_back, "num_experts")
"""The number of experts: `num_experts` for transformers 4, `num_local_experts` for transformers 5."""


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=rows,
    settings=(
        *decoder_settings(kv_heads=4, max_seq_len=32768, norm_eps=1e-6),
        HEAD_DIM,
        SILU,
        rope(),
        biases("attention_bias", ("qkv", "attention_out")),
        always("qk_norm", True),
        pattern(SWITCHED_WINDOW, SPARSE_STEP),
        *sizes(intermediate_size="d_ff"),
        width("moe_intermediate_size", "moe.d_ff", 768),
        COUNT,
        inert("max_window_layers"),
        routed("num_experts_per_tok", "moe.top_k", 8),
        routed("norm_topk_prob", "moe.renormalize", False),
    ),
)
