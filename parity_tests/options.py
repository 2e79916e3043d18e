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
ATTENTION: Options = {}
# Blocks of 64 tokens: the last block of an expert reaches into the rows of the next one.
EXPERTS = {"pattern": ("attention+moe",), "n_layers": 2}
GROUPS = {"n_experts": 8, "n_groups": 4, "top_groups": 2, "top_k": 3}
MOE: Options = {
    "moe": EXPERTS,
    "moe unroll": {**EXPERTS, "layer_loop": "unroll"},
    "moe and mlp": {"pattern": ("attention+mlp", "attention+moe"), "n_layers": 4},
    "moe of two kinds": {
        "pattern": ("attention+moe(n_experts=4, top_k=1, d_ff=24)", "attention+mlp", "attention+moe(balance_loss=0.1)"),
        "layer_loop": "unroll",
        "moe": {"z_loss": 1e-2, "selection_bias": True},
    },
    "moe naive": {**EXPERTS, "moe": {"impl": "naive"}},
    "moe blocks": {**EXPERTS, "moe": {"impl": "blocks"}},
    "moe ragged": {**EXPERTS, "moe": {"impl": "ragged"}},
    "moe sizes": {**EXPERTS, "moe": {"n_experts": 6, "top_k": 3, "d_ff": 20}},
    "moe shared": {**EXPERTS, "moe": {"n_shared": 2, "d_ff": 20}, "biases": ("mlp",)},
    "moe sigmoid": {**EXPERTS, "moe": {"router": "sigmoid", "route_scale": 2.5, "z_loss": 1e-2, "balance_loss": 0.1}},
    "moe switch": {**EXPERTS, "moe": {"top_k": 1, "renormalize": False, "balance_loss": 1e-2}},
    "moe groups": {**EXPERTS, "moe": GROUPS},
    "moe selection bias": {**EXPERTS, "moe": {**GROUPS, "selection_bias": True, "bias_update_rate": 0.01}},
    "moe noisy": {**EXPERTS, "moe": {"noisy": True}},
    "moe capacity": {**EXPERTS, "moe": {"capacity_factor": 0.75, "impl": "ragged"}},
    "moe losses": {**EXPERTS, "moe": {"balance_loss": 0.1, "importance_loss": 0.2, "z_loss": 1e-2}},
    "moe losses, remat": {**EXPERTS, "moe": {"balance_loss": 0.1, "capacity_factor": 1.25}, "remat": "full"},
    "moe clamped": {**EXPERTS, "activation": "swiglu_clamped", "biases": ("router", "experts")},
    "moe gelu": {**EXPERTS, "activation": "gelu", "biases": ("experts",), "moe": {"impl": "blocks"}},
    "moe gelu ragged": {**EXPERTS, "activation": "gelu", "biases": ("experts",), "moe": {"impl": "ragged"}},
    "mlp clamped": {"activation": "swiglu_clamped"},
}
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
