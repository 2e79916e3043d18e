"""Examples of the families with state spaces."""

from __future__ import annotations

import functools
from typing import Any

from transformers import JambaConfig, Mamba2Config, MambaConfig

from parity_tests.families import Example, example

TWO = {"n_layers": 2, "positions": "none"}
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
AS_OURS: dict[str, Any] = {"residual_in_fp32": False, "initializer_range": 0.02}
"""What every file says that we write."""
MAMBA = functools.partial(example, "mamba", theirs=MambaConfig, pattern=("mamba",))
MAMBA2 = functools.partial(example, "mamba2", theirs=Mamba2Config, pattern=("mamba2",))
JAMBA = functools.partial(example, "jamba", theirs=JambaConfig)
ATTENTION = {"intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}

EXAMPLES: tuple[Example, ...] = (
    MAMBA(
        "odd sizes, biases",
        said={
            **SIZES,
            **AS_OURS,
            "state_size": 5,
            "expand": 3,
            "conv_kernel": 3,
            "time_step_rank": 7,
            "use_bias": True,
        },
        mamba={"d_state": 5, "expand": 3, "d_conv": 3, "dt_rank": 7, "proj_bias": True},
        **TWO,
    ),
    MAMBA(
        "defaults, untied",
        said={**SIZES, **AS_OURS, "use_conv_bias": False, "tie_word_embeddings": False, "time_step_max": 0.5},
        mamba={"conv_bias": False, "dt_max": 0.5},
        tie_embeddings=False,
        **TWO,
    ),
    MAMBA2(
        "groups",
        said={
            **SIZES,
            **AS_OURS,
            "state_size": 5,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "tie_word_embeddings": True,
        },
        mamba={"d_state": 5, "head_dim": 8, "n_groups": 2},
        **TWO,
    ),
    MAMBA2(
        "odd sizes, biases, untied",
        said={
            **SIZES,
            **AS_OURS,
            "state_size": 3,
            "expand": 3,
            "conv_kernel": 2,
            "num_heads": 3,
            "head_dim": 32,
            "n_groups": 1,
            "use_bias": True,
            "use_conv_bias": False,
        },
        mamba={
            "d_state": 3,
            "expand": 3,
            "d_conv": 2,
            "head_dim": 32,
            "n_groups": 1,
            "proj_bias": True,
            "conv_bias": False,
        },
        tie_embeddings=False,
        **TWO,
    ),
    JAMBA(
        "experts, attention once",
        said={
            **SIZES,
            **ATTENTION,
            "num_hidden_layers": 4,
            "mamba_d_state": 5,
            "num_experts": 3,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "max_position_embeddings": 512,
        },
        pattern=("mamba+mlp", "mamba+moe", "attention+mlp", "mamba+moe"),
        n_layers=4,
        positions="none",
        mamba={"d_state": 5, "inner_norms": True},
        moe={"n_experts": 3, "top_k": 2, "renormalize": False},
        tie_embeddings=False,
    ),
    JAMBA(
        "no experts, tied, biases",
        said={
            **SIZES,
            **ATTENTION,
            "mamba_d_state": 4,
            "mamba_d_conv": 3,
            "mamba_dt_rank": 5,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "tie_word_embeddings": True,
            "max_position_embeddings": 512,
        },
        pattern=("attention+mlp", "mamba+mlp"),
        mamba={
            "d_state": 4,
            "d_conv": 3,
            "dt_rank": 5,
            "proj_bias": True,
            "conv_bias": False,
            "inner_norms": True,
        },
        **TWO,
    ),
)
