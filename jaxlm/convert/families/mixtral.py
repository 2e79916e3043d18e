"""The layout of Hugging Face's MixtralForCausalLM (Mixtral 8x7B and 8x22B): its rows, and its config.json."""

from __future__ import annotations

from jaxlm import config
from jaxlm.convert.families.experts import (
    ALL_EXPERTS,
    ONE_WINDOW,
    Pattern,
    Routed,
    Width,
    decoder_settings,
    expert_rows,
)
from jaxlm.convert.families.llama import HEAD_DIM, SILU, Rope, attention_rows, outer_rows
from jaxlm.convert.family import Family
from jaxlm.convert.rows import Row, matrix
from jaxlm.convert.settings import Says


def rows(cfg: config.Model) -> list[Row]:
    """Llama's, with experts."""
    theirs = "model.layers.{i}.block_sparse_moe"
    return [
        *outer_rows(),
        *attention_rows(cfg),
        Row("layers.{i}.ffn.router.kernel", f"{theirs}.gate.weight", matrix),
        *expert_rows(theirs, gate="w1", up="w3", down="w2"),
    ]


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    rows=rows,
    settings=(
        *decoder_settings(kv_heads=8, max_seq_len=131072, norm_eps=1e-5),
        HEAD_DIM,
        SILU,
        Rope(1e6),
        Pattern(ONE_WINDOW, ALL_EXPERTS),
        Width("intermediate_size", "d_ff"),
        Routed("num_local_experts", "moe.n_experts", 8),
        Routed("num_experts_per_tok", "moe.top_k", 2),
        Says("router_jitter_noise", 0.0),
    ),
)
