"""The layout of Hugging Face's GPT2LMHeadModel: LayerNorm, learned positions, queries, keys and values in one tensor.

Its kernels are [in, out] (`Conv1D`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxlm import config
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, flat, join, matrix, plain
from jaxlm.convert.settings import Always, Choice, Fixed, Key, Says


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


class Inner:
    """`n_inner`, the width of the feed-forward; null: four times that of the residual stream."""

    def out(self, model: config.Model) -> dict[str, Any]:
        """See `Setting`."""
        return {"n_inner": None if model.d_ff == 4 * model.d_model else model.d_ff}

    def back(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """See `Setting`."""
        given = hf.get("n_inner")
        return {"d_ff": 4 * hf["n_embd"] if given is None else given}


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
        Key("n_positions", "max_seq_len", 1024),
        Inner(),
        Choice("activation_function", "activation", ACTIVATIONS, "gelu_new"),
        Key("layer_norm_epsilon", "norm_eps", 1e-5),
        Key("initializer_range", "init_std", 0.02),
        Key("tie_word_embeddings", "tie_embeddings", True),
        Key("embd_pdrop", "dropout", 0.1),
        Key("resid_pdrop", "dropout", 0.1),
        Says("attn_pdrop", 0.0),
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("reorder_and_upcast_attn", False, (True,)),  # the same function, rounded elsewhere
        Fixed("add_cross_attention", False),
        Always("norm", "layernorm"),
        Always("positions", "learned"),
        Always("biases", ["qkv", "attention_out", "mlp"]),
        Always("pattern", ["attention+mlp"]),
    ),
    embedding="transformer.wte.weight",
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
