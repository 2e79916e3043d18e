"""Examples of the families with experts."""

from __future__ import annotations

import functools
from typing import Any

import transformers

from parity_tests.families import SIZES, Example, example

MIXTRAL = functools.partial(example, "mixtral", theirs=transformers.MixtralConfig)
QWEN3_MOE = functools.partial(example, "qwen3_moe", theirs=transformers.Qwen3MoeConfig)
GPT_OSS = functools.partial(example, "gpt_oss", theirs=transformers.GptOssConfig)
DOTS1 = functools.partial(example, "dots1", theirs=transformers.Dots1Config)

TWO: dict[str, Any] = {"n_layers": 2, "tie_embeddings": False}
YARN = {"factor": 8.0, "beta_slow": 1.0, "beta_fast": 32.0, "truncate": False}

EXAMPLES: tuple[Example, ...] = (
    MIXTRAL(
        "window, tied, wide heads, one expert of a token",
        said={
            **SIZES,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "rope_theta": 1e4,
            "head_dim": 12,
            "sliding_window": 100,
            "tie_word_embeddings": True,
        },
        **TWO | {"tie_embeddings": True},
        moe={"n_experts": 4, "top_k": 1},
        head_dim=12,
        window=100,
        pattern=("attention+moe",),
    ),
    MIXTRAL(
        "interleaved, theta",
        said={**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2, "rope_theta": 1e6, "head_dim": 8},
        rope_theta=1e6,
        rope_layout="interleaved",
        moe={"n_experts": 5, "top_k": 2, "d_ff": 40},
        pattern=("attention+moe",),
        **TWO,
    ),
    QWEN3_MOE(
        "experts in every second layer, not renormalised, interleaved, scanned",
        said={
            **SIZES,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        },
        **TWO,
        moe={"n_experts": 6, "top_k": 3, "d_ff": 24, "renormalize": False},
        qk_norm=True,
        rope_layout="interleaved",
        layer_loop="scan",
        pattern=("attention+mlp", "attention+moe"),
    ),
    QWEN3_MOE(
        "experts in some layers, window, biases, wide heads, renormalised",
        said={
            **SIZES,
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "head_dim": 12,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 100,
        },
        n_layers=3,
        tie_embeddings=False,
        moe={"n_experts": 4, "top_k": 2, "d_ff": 24},
        qk_norm=True,
        head_dim=12,
        window=100,
        biases=("qkv", "attention_out"),
        pattern=("attention+moe", "attention+mlp", "attention+moe"),
    ),
    GPT_OSS(
        "YaRN that is not truncated, window in every second layer",
        said={
            **SIZES,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 100,
            "rope_parameters": {
                **YARN,
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "original_max_position_embeddings": 64,
            },
        },
        **TWO,
        head_dim=16,
        rope_theta=150000.0,
        rope_scaling={**YARN, "kind": "yarn", "original_max_seq_len": 64},
        moe={"n_experts": 4, "top_k": 2, "d_ff": 40},
        activation="swiglu_clamped",
        sink_logits=True,
        biases=("qkv", "attention_out", "router", "experts"),
        pattern=("attention(window=100)+moe", "attention+moe"),
    ),
    GPT_OSS(
        "window in the last layers, no biases of attention, tied",
        said={
            **SIZES,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "sliding_window": 33,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_bias": False,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        n_layers=3,
        moe={"n_experts": 3, "top_k": 2, "d_ff": 40},
        activation="swiglu_clamped",
        sink_logits=True,
        biases=("router", "experts"),
        pattern=("attention+moe", "attention(window=33)+moe", "attention(window=33)+moe"),
    ),
    DOTS1(
        "groups, scale, dense first layer",
        said={
            **SIZES,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "sliding_window": None,
        },
        **TWO,
        moe={
            "n_experts": 8,
            "top_k": 3,
            "d_ff": 24,
            "n_shared": 2,
            "router": "sigmoid",
            "n_groups": 4,
            "top_groups": 2,
            "route_scale": 2.5,
            "selection_bias": True,
        },
        qk_norm=True,
        pattern=("attention+mlp", "attention+moe"),
    ),
    DOTS1(
        "one group, window in the last layers, biases, not renormalised",
        said={
            **SIZES,
            "num_hidden_layers": 3,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "attention_bias": True,
            "sliding_window": 100,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        n_layers=3,
        tie_embeddings=False,
        moe={
            "n_experts": 5,
            "top_k": 2,
            "d_ff": 24,
            "n_shared": 1,
            "router": "sigmoid",
            "renormalize": False,
            "selection_bias": True,
        },
        qk_norm=True,
        biases=("qkv", "attention_out"),
        pattern=("attention+moe", "attention(window=100)+moe", "attention(window=100)+moe"),
    ),
)
