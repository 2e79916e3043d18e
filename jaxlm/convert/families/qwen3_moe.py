"""The layout of Hugging Face's Qwen3MoeForCausalLM (Qwen3-30B-A3B, Qwen3-Coder): its rows, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm import config
from jaxlm.convert.families.experts import (
    SPARSE_STEP,
    SWITCHED_WINDOW,
    Inert,
    Pattern,
    Routed,
    Width,
    decoder_settings,
    expert_rows,
    of_experts,
)
from jaxlm.convert.families.llama import HEAD_DIM, SILU, Rope, attention_rows, mlp_rows, outer_rows
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, matrix
from jaxlm.convert.settings import Always, Biases


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


class Count:
    """The number of experts: `num_experts` for transformers 4, `num_local_experts` for transformers 5."""

    def out(self, model: config.Model) -> dict[str, Any]:
        """See `Setting`."""
        count = of_experts(model).moe.n_experts
        return {"num_experts": count, "num_local_experts": count}

    def back(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """See `Setting`."""
        counts = {hf[key] for key in ("num_experts", "num_local_experts") if key in hf} or {128}
        if len(counts) > 1:
            raise ValueError(f"num_experts = {hf['num_experts']}, but num_local_experts = {hf['num_local_experts']}")
        return {"moe.n_experts": counts.pop()}


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=rows,
    settings=(
        *decoder_settings(kv_heads=4, max_seq_len=32768, norm_eps=1e-6),
        HEAD_DIM,
        SILU,
        Rope(),
        Biases("attention_bias", ("qkv", "attention_out")),
        Always("qk_norm", True),
        Pattern(SWITCHED_WINDOW, SPARSE_STEP),
        *sizes(intermediate_size="d_ff"),
        Width("moe_intermediate_size", "moe.d_ff", 768),
        Count(),
        Inert("max_window_layers"),
        Routed("num_experts_per_tok", "moe.top_k", 8),
        Routed("norm_topk_prob", "moe.renormalize", False),
    ),
)
