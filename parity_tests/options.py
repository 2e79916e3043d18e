"""Every option of the model alone, and mixtures of them: what the rungs from logits to optimiser steps walk through.

An entry holds options of `config.Model` on top of `pairs.BASE`; `loss` are options of the loss.
"""

from __future__ import annotations

from typing import Any

from jaxlm import config

Options = dict[str, dict[str, Any]]

DENSE: Options = {
    "base": {},
    "one layer": {"n_layers": 1},
    "unroll": {"layer_loop": "unroll"},
    "pattern of two": {"pattern": ("attention+mlp", "attention+mlp"), "n_layers": 4},
    "pattern of two, unroll": {"pattern": ("attention+mlp", "attention+mlp"), "n_layers": 2, "layer_loop": "unroll"},
    "layernorm": {"norm": "layernorm"},
    "eps": {"norm_eps": 1e-6},
    "post": {"norm_position": "post"},
    "no final norm": {"final_norm": False},
    "rope interleaved": {"rope_layout": "interleaved"},
    "rope theta": {"rope_theta": 5e5},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "MHA": {"n_kv_heads": 4},
    "MQA": {"n_kv_heads": 1},
    "head dim": {"head_dim": 10},
    "odd sizes": {"d_model": 33, "head_dim": 7, "d_ff": 41, "positions": "sinusoidal", "n_heads": 3, "n_kv_heads": 3},
    "bias qkv": {"biases": ("qkv",)},
    "bias qkv, no positions": {"biases": ("qkv",), "positions": "none"},
    "bias out": {"biases": ("attention_out",)},
    "bias mlp": {"biases": ("mlp",)},
    "bias head": {"biases": ("head",), "tie_embeddings": False},
    "qk norm": {"qk_norm": True},
    "gelu": {"activation": "gelu"},
    "gelu tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "untied": {"tie_embeddings": False},
    "remat full": {"remat": "full"},
    "remat dots": {"remat": "dots", "layer_loop": "unroll"},
    "attention auto": {"attention_impl": "auto"},
    "attention auto, unroll": {"attention_impl": "auto", "layer_loop": "unroll"},
    "attention blockwise": {"attention_impl": "blockwise"},
    "z-loss": {"loss": {"z_loss": 1e-2}},
    "label smoothing": {"loss": {"label_smoothing": 0.1}},
}
ATTENTION: Options = {}
MOE: Options = {}


def small(**options: Any) -> config.Mamba:
    """Mamba with a state of 5 and heads of 8."""
    return config.Mamba(d_state=5, head_dim=8, **options)


JAMBA = ("mamba+mlp", "mamba(d_state=3)", "attention+mlp")
MAMBA: Options = {
    "mamba": {"pattern": ("mamba",), "n_layers": 2},
    "mamba unroll": {
        "pattern": ("mamba",),
        "n_layers": 1,
        "layer_loop": "unroll",
        "mamba": small(expand=3, d_conv=3, dt_rank=5),
    },
    "mamba sequential": {
        "pattern": ("mamba",),
        "n_layers": 1,
        "mamba": small(impl="sequential", conv_bias=False, d_conv=1),
    },
    "mamba biases": {
        "pattern": ("mamba+mlp",),
        "n_layers": 1,
        "mamba": small(proj_bias=True, inner_norms=True, chunk=7),
    },
    "mamba post": {"pattern": ("mamba+mlp",), "n_layers": 1, "mamba": small(), "norm_position": "post"},
    "mamba2": {"pattern": ("mamba2",), "n_layers": 1, "mamba": config.Mamba(head_dim=16)},
    "mamba2 groups": {
        "pattern": ("mamba2",),
        "n_layers": 2,
        "layer_loop": "unroll",
        "mamba": small(n_groups=4, chunk=100),
    },
    "mamba2 sequential": {
        "pattern": ("mamba2+mlp",),
        "n_layers": 1,
        "mamba": small(impl="sequential", n_groups=2),
    },
    "mamba2 biases": {"pattern": ("mamba2(chunk=9)",), "n_layers": 2, "mamba": small(proj_bias=True, conv_bias=False)},
    "jamba": {"pattern": JAMBA, "mamba": small()},
    "jamba unroll": {"pattern": JAMBA, "mamba": small(inner_norms=True), "layer_loop": "unroll"},
    "mamba2 hybrid": {"pattern": ("attention+mlp", "mamba2", "mamba+mlp"), "mamba": small(), "remat": "full"},
}
OPTIONS: Options = DENSE | ATTENTION | MOE | MAMBA

MIXTURES: Options = {
    "llama": {"attention_impl": "auto", "norm_eps": 1e-6, "tie_embeddings": False, "rope_theta": 5e5},
    "gpt2": {
        "attention_impl": "auto",
        "norm": "layernorm",
        "positions": "learned",
        "activation": "gelu_tanh",
        "biases": ("qkv", "attention_out", "mlp"),
        "n_kv_heads": 4,
        "layer_loop": "unroll",
    },
    "2017": {
        "attention_impl": "auto",
        "norm": "layernorm",
        "norm_position": "post",
        "positions": "sinusoidal",
        "activation": "relu",
        "final_norm": False,
        "head_dim": 9,
        "loss": {"label_smoothing": 0.1},
    },
    "all else": {
        "attention_impl": "auto",
        "qk_norm": True,
        "rope_layout": "interleaved",
        "n_kv_heads": 1,
        "biases": ("qkv", "attention_out", "mlp", "head"),
        "tie_embeddings": False,
        "remat": "full",
        "pattern": ("attention+mlp", "attention+mlp"),
        "n_layers": 2,
        "loss": {"z_loss": 1e-2, "label_smoothing": 0.1},
    },
}
