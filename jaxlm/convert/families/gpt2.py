"""The layout of Hugging Face's GPT2LMHeadModel: LayerNorm, learned positions, queries, keys and values in one tensor.

Its kernels are [in, out] (`Conv1D`).
"""

from __future__ import annotations

from typing import Any

from jaxlm import config
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, flat, join, matrix, plain
from jaxlm.convert.settings import Hf, Setting, always, choice, fixed, key, says


def rows(cfg: config.Model) -> list[Row]:
    """The whole model."""
    ours, theirs = "layers.{i}", "transformer.h.{i}"
    qkv = [f"{ours}.mixer.{name}_proj" for name in "qkv"]
    norms = {
        f"{ours}.mixer_norm": f"{theirs}.ln_1",
        f"{ours}.ffn_norm": f"{theirs}.ln_2",
        "final_norm": "transformer.ln_f",
    }
    maps = {
        f"{ours}.mixer.o_proj": f"{theirs}.attn.c_proj",
        f"{ours}.ffn.up_proj": f"{theirs}.mlp.c_fc",
        f"{ours}.ffn.down_proj": f"{theirs}.mlp.c_proj",
    }
    return [
        Row("embed.embedding", "transformer.wte.weight"),
        Row("position_embed.embedding", "transformer.wpe.weight"),
        Row(tuple(f"{name}.kernel" for name in qkv), f"{theirs}.attn.c_attn.weight", plain, join(1)),
        Row(tuple(f"{name}.bias" for name in qkv), f"{theirs}.attn.c_attn.bias", flat, join(0)),
        *(Row(f"{mine}.scale", f"{other}.weight") for mine, other in norms.items()),
        *(Row(f"{mine}.bias", f"{other}.bias") for mine, other in norms.items()),
        *(Row(f"{mine}.kernel", f"{other}.weight", plain) for mine, other in maps.items()),
        *(Row(f"{mine}.bias", f"{other}.bias") for mine, other in maps.items()),
        Row("head.kernel", "lm_head.weight", matrix),
    ]


def _inner_back(hf: Hf) -> dict[str, Any]:
    given = hf.get("n_inner")
    return {"d_ff": 4 * hf["n_embd"] if given is None else given}


INNER = Setting(
    lambda model: {"n_inner": None if model.d_ff == 4 * model.d_model else model.d_ff}, _inner_back, "n_inner"
)
"""`n_inner`, the width of the feed-forward; null: four times that of the residual stream."""


ACTIVATIONS = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"),
    "gelu": ("gelu",),
    "relu": ("relu",),
    "silu": ("silu", "swish"),
}

FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    rows=rows,
    settings=(
        *sizes(vocab_size="vocab_size", n_embd="d_model", n_layer="n_layers", n_head="n_heads"),
        key("n_positions", "max_seq_len", 1024),
        INNER,
        choice("activation_function", "activation", ACTIVATIONS, "gelu_new"),
        key("layer_norm_epsilon", "norm_eps", 1e-5),
        key("initializer_range", "init_std", 0.02),
        key("tie_word_embeddings", "tie_embeddings", True),
        key("embd_pdrop", "dropout", 0.1),
        key("resid_pdrop", "dropout", 0.1),
        says("attn_pdrop", 0.0),
        fixed("scale_attn_weights", True),
        fixed("scale_attn_by_inverse_layer_idx", False),
        fixed("reorder_and_upcast_attn", False, (True,)),  # the same function, rounded elsewhere
        fixed("add_cross_attention", False),
        always("norm", "layernorm"),
        always("positions", "learned"),
        always("biases", ["qkv", "attention_out", "mlp"]),
        always("pattern", ["attention+mlp"]),
    ),
    embedding="transformer.wte.weight",
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
