"""Jamba: blocks of Mamba and of attention without positions, with a SwiGLU or with experts (Lieber et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlm import config
from jaxlm.convert.families.llama import KV_HEADS, SILU, attention_rows, mlp_rows
from jaxlm.convert.families.mamba import mixer_rows, own, rank
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, each, matrix
from jaxlm.convert.settings import Hf, Setting, always, fixed, key, says, shortest_pattern


def rows(cfg: config.Model) -> list[Row]:
    """Every layer has the rows of its own mixer and feed-forward."""
    ours, theirs = "layers.{i}", "model.layers.{i}"
    experts = "feed_forward.experts.{e}"
    return [
        Row("embed.embedding", "model.embed_tokens.weight"),
        Row(f"{ours}.mixer_norm.scale", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}.ffn_norm.scale", f"{theirs}.pre_ff_layernorm.weight"),
        Row("final_norm.scale", "model.final_layernorm.weight"),
        Row("head.kernel", "lm_head.weight", matrix),
        *attention_rows(cfg),
        *mixer_rows(f"{theirs}.mamba"),
        *mlp_rows(theirs=f"{theirs}.feed_forward"),
        Row(f"{ours}.ffn.router.kernel", f"{theirs}.feed_forward.router.weight", matrix),
        *(
            Row(f"{ours}.ffn.experts.{name}_proj.kernel", f"{theirs}.{experts}.{name}_proj.weight", matrix, each)
            for name in ("gate", "up", "down")
        ),
    ]


def _periods_out(model: config.Model) -> dict[str, Any]:
    """Layers that keep to no period are left out."""
    blocks = [model.halves(kind) for kind in model.pattern]
    experts = [block.ffn.moe for block in blocks if block.ffn_name == "moe"]
    periods = {
        "attn_layer": period([block.mixer_name == "attention" for block in blocks], model.repeats),
        "expert_layer": period([block.ffn_name == "moe" for block in blocks], model.repeats) if experts else (1, 0),
    }
    numbers = {
        f"{kind}_{name}": number
        for kind, found in periods.items()
        for name, number in zip(("period", "offset"), found, strict=False)
    }
    if not experts:
        return {**numbers, "num_experts": 1, "num_experts_per_tok": 1}
    return {**numbers, "num_experts": experts[0].n_experts, "num_experts_per_tok": experts[0].top_k}


def _periods_back(hf: Hf) -> dict[str, Any]:
    attends = _comes_back(hf, "attn_layer", 8, 4)
    experts = _comes_back(hf, "expert_layer", 2, 1)
    count, top_k = hf.get("num_experts", 16), hf.get("num_experts_per_tok", 2)
    experts = [is_one and count > 1 for is_one in experts]
    blocks = [
        f"{'attention' if attention else 'mamba'}+{'moe' if moe else 'mlp'}"
        for attention, moe in zip(attends, experts, strict=True)
    ]
    chosen = {"moe.n_experts": count, "moe.top_k": top_k, "moe.renormalize": False} if any(experts) else {}
    return {"pattern": shortest_pattern(blocks), **chosen}


PERIODS = Setting(_periods_out, _periods_back, "attn_layer_period")
"""Attention and experts come back every so many layers; a layer has experts if there are more than one."""


def period(chosen: Sequence[bool], repeats: int) -> tuple[int, int] | tuple[()]:
    """(p, o) so that `i % p == o` for exactly the chosen layers i of a repeated pattern; empty if there is none.

    Of several, the first that would also choose those of one repeat more, if there is one.
    """
    for layers in (list(chosen) * (repeats + 1), list(chosen) * repeats):
        for p in range(1, len(layers) + 2):
            for o in range(p):
                if [i % p == o for i in range(len(layers))] == layers:
                    return p, o
    return ()


def _comes_back(hf: Hf, kind: str, period: int, offset: int) -> list[bool]:
    period, offset = hf.get(f"{kind}_period", period), hf.get(f"{kind}_offset", offset)
    if not 0 <= offset < period:
        raise ValueError(f"{kind}_offset = {offset} is not below {kind}_period = {period}")
    return [i % period == offset for i in range(hf["num_hidden_layers"])]


FAMILY = Family(
    name="jamba",
    architecture="JambaForCausalLM",
    rows=rows,
    settings=(
        *sizes(
            vocab_size="vocab_size",
            hidden_size="d_model",
            intermediate_size="d_ff",
            num_hidden_layers="n_layers",
            num_attention_heads="n_heads",
        ),
        KV_HEADS,
        PERIODS,
        own("mamba_d_state", "mamba.d_state", 16),
        own("mamba_d_conv", "mamba.d_conv", 4),
        own("mamba_expand", "mamba.expand", 2),
        rank("mamba_dt_rank"),
        own("mamba_conv_bias", "mamba.conv_bias", True),
        own("mamba_proj_bias", "mamba.proj_bias", False),
        fixed("mamba_inner_layernorms", None, (True,)),
        always("mamba.inner_norms", True),
        key("initializer_range", "init_std", 0.02),
        key("max_position_embeddings", "max_seq_len", 262144),
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("tie_word_embeddings", "tie_embeddings", False),
        SILU,
        fixed("sliding_window", None),
        says("attention_dropout", 0.0),
        always("positions", "none"),
    ),
    inert=(
        "router_aux_loss_coef",
        "output_router_logits",
        "num_logits_to_keep",
        "use_associative_scan",
        "use_mamba_kernels",
        "use_mambapy",
    ),
)
