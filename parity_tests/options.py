"""Every option of the model alone, and mixtures of them: what the rungs from logits to optimiser steps walk through.

An entry holds options of `config.Model` on top of `pairs.BASE`; `loss` are options of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
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
ATTENTION: Options = {
    "window": {"window": 40},
    "window beyond the row": {"window": 600, "n_layers": 1, "attention_impl": "blockwise"},
    "window, unroll, blockwise": {"window": 40, "attention_impl": "blockwise", "layer_loop": "unroll", "n_layers": 2},
    "window and NoPE": {"pattern": ("attention(window=16)+mlp", "attention(positions=none)+mlp"), "n_layers": 2},
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
    "sink logits": {"sink_logits": True, "n_layers": 1},
    "sink tokens, qk norm, biases": {"sink_tokens": 2, "qk_norm": True, "biases": ("qkv",), "n_layers": 1},
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
    "partial rotary, interleaved": {"rotary_fraction": 0.5, "rope_layout": "interleaved", "n_layers": 1},
    "linear": {"rope_scaling": {"kind": "linear", "factor": 3.0}, "n_layers": 1},
    "ntk": {"rope_scaling": {"kind": "ntk", "factor": 3.0}, "n_layers": 1},
    "llama3, factors": {
        "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 64}
        | {"low_freq_factor": 2.0, "high_freq_factor": 16.0},
        "n_layers": 1,
    },
    "yarn, factors": {
        "rope_scaling": {"kind": "yarn", "factor": 8.0, "original_max_seq_len": 64, "truncate": False}
        | {"beta_slow": 0.5, "beta_fast": 8.0, "attention_factor": 1.1},
        "head_dim": 16,
        "window": 24,
        "keep_first": 3,
        "n_layers": 1,
    },
}
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
    "window and sinks": {
        "attention_impl": "auto",
        "window": 50,
        "keep_first": 3,
        "n_layers": 1,
        "sink_logits": True,
        "sink_tokens": 2,
        "softcap": 5.0,
        "rope_scaling": {"kind": "yarn", "original_max_seq_len": 64},
        "n_heads": 16,  # of a gradient of few elements, one a head, the error is chance
        "head_dim": 8,
        "biases": ("qkv", "attention_out"),
        "layer_loop": "unroll",
    },
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


def quick() -> set[str]:
    """What `make test` tries; `make soak` tries all: mixtures, and options with a value that none before them has."""
    seen = {pair for options in MIXTURES.values() for pair in _values(options)}
    found = set(MIXTURES)
    for name, options in OPTIONS.items():
        if new := set(_values(options)) - seen:
            seen |= new
            found.add(name)
    return found


def _values(options: dict[str, Any], section: str = "") -> Iterator[tuple[str, str]]:
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _values(value, f"{section}{name}.")
        elif name != "n_layers":
            yield section + name, str(value)
