"""Every option of the model alone, and mixtures of them: what the rungs from logits to optimiser steps walk through.

An entry holds options of `config.Model` on top of `pairs.BASE`; `loss` are options of the loss.
"""

from __future__ import annotations

from typing import Any

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
ATTENTION: Options = {
    "window": {"window": 40},
    "window of one token": {"window": 1, "n_layers": 1},
    "window beyond the row": {"window": 600, "n_layers": 1, "attention_impl": "blockwise"},
    "window, unroll, blockwise": {"window": 40, "attention_impl": "blockwise", "layer_loop": "unroll", "n_layers": 2},
    "window and all": {"pattern": ("attention(window=16)+mlp", "attention+mlp"), "n_layers": 2},
    "window and NoPE": {"pattern": ("attention(window=32)+mlp", "attention(positions=none)+mlp"), "n_layers": 2},
    "two rotations": {
        "pattern": ("attention(window=32)+mlp", "attention(rope_theta=1e6, rotary_fraction=0.5)+mlp"),
        "n_layers": 2,
        "layer_loop": "unroll",
    },
    "heads of their own": {
        "pattern": ("attention(n_heads=2, n_kv_heads=1, head_dim=12)+mlp", "attention(qk_norm=true)+mlp"),
        "n_layers": 2,
        "layer_loop": "unroll",
    },
    "keep first": {"window": 24, "keep_first": 3},
    "keep first, learned": {"window": 24, "keep_first": 3, "positions": "learned", "n_layers": 1},
    "sink logits": {"sink_logits": True},
    "sink tokens": {"sink_tokens": 2},
    "sink tokens, qk norm, biases": {"sink_tokens": 2, "qk_norm": True, "biases": ("qkv",), "n_layers": 1},
    "soft cap": {"softcap": 2.0},
    "soft cap, blockwise": {"softcap": 2.0, "attention_impl": "blockwise", "n_layers": 1},
    "every sink": {
        "window": 40,
        "keep_first": 3,
        "sink_tokens": 2,
        "sink_logits": True,
        "softcap": 3.0,
        "attention_impl": "blockwise",
        "layer_loop": "unroll",
        "n_layers": 2,
    },
    "partial rotary": {"rotary_fraction": 0.5, "n_layers": 1},
    "partial rotary, interleaved": {"rotary_fraction": 0.5, "rope_layout": "interleaved", "n_layers": 1},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 3.0}, "n_layers": 1},
    "ntk": {"rope_scaling": {"kind": "ntk", "factor": 3.0}, "n_layers": 1},
    "llama3": {"rope_scaling": {"kind": "llama3", "original_max_seq_len": 64}, "n_layers": 1},
    "llama3, factors": {
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 64}
        | {"low_freq_factor": 2.0, "high_freq_factor": 16.0},
        "n_layers": 1,
    },
    "yarn": {"rope_scaling": {"kind": "yarn", "original_max_seq_len": 64}, "head_dim": 16},
    "yarn, factors": {
        "rope_scaling": {"kind": "yarn", "factor": 8.0, "original_max_seq_len": 64, "truncate": False}
        | {"beta_slow": 0.5, "beta_fast": 8.0, "attention_factor": 1.1},
        "head_dim": 16,
        "window": 24,
        "keep_first": 3,
        "n_layers": 1,
    },
}
MOE: Options = {}
MAMBA: Options = {}
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
