"""The layout of Hugging Face's MixtralForCausalLM (Mixtral 8x7B and 8x22B): its rows, and its config.json."""

from __future__ import annotations

from jaxlm import config
from jaxlm.convert.families.experts import (
    ALL_EXPERTS,
    ONE_WINDOW,
    decoder_settings,
    expert_rows,
    pattern,
    routed,
    width,
)
from jaxlm.convert.families.llama import HEAD_DIM, SILU, attention_rows, outer_rows, rope
from jaxlm.convert.family import Family
from jaxlm.convert.rows import Row, matrix
from jaxlm.convert.settings import says


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
        rope(1e6),
        pattern(ONE_WINDOW, ALL_EXPERTS),
        width("intermediate_size", "d_ff"),
        routed("num_local_experts", "moe.n_experts", 8),
        routed("num_experts_per_tok", "moe.top_k", 2),
        says("router_jitter_noise", 0.0),
    ),
)
