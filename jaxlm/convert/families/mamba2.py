"""Mamba-2 (AntonV/mamba2-130m-hf, mistralai/Mamba-Codestral-7B-v0.1).

`norm_before_gate` is not read: the gate is applied before the norm whatever it says, in transformers as in the code of
Dao & Gu, and Codestral's config.json says otherwise by mistake (transformers, pull request 32686). On
`residual_in_fp32` see `mamba`.
"""

from __future__ import annotations

import math
from typing import Any

from jaxlm import config
from jaxlm.convert.families.mamba import BLOCKS, first, outer_rows, own, taps
from jaxlm.convert.family import Family
from jaxlm.convert.rows import Row, flat, join, matrix
from jaxlm.convert.settings import Hf, Setting, always, fixed, key


def rows(cfg: config.Model) -> list[Row]:
    """One projection holds z, x, B, C and the step size, and one convolution x, B and C."""
    ours, theirs = "layers.{i}.mixer", "backbone.layers.{i}.mixer"
    projections = ("in_proj", "bc_proj", "dt_proj")
    return [
        *outer_rows(),
        Row(tuple(f"{ours}.{name}.kernel" for name in projections), f"{theirs}.in_proj.weight", matrix, join(0)),
        Row(tuple(f"{ours}.{name}.bias" for name in projections), f"{theirs}.in_proj.bias", flat, join(0)),
        Row((f"{ours}.conv.kernel", f"{ours}.bc_conv.kernel"), f"{theirs}.conv1d.weight", taps, join(0)),
        Row((f"{ours}.conv.bias", f"{ours}.bc_conv.bias"), f"{theirs}.conv1d.bias", join(0)),
        Row(f"{ours}.dt_bias", f"{theirs}.dt_bias"),
        Row(f"{ours}.A_log", f"{theirs}.A_log"),
        Row(f"{ours}.D", f"{theirs}.D"),
        Row(f"{ours}.norm.scale", f"{theirs}.norm.weight"),
        Row(f"{ours}.out_proj.kernel", f"{theirs}.out_proj.weight", matrix),
        Row(f"{ours}.out_proj.bias", f"{theirs}.out_proj.bias"),
    ]


def _heads_out(model: config.Model) -> dict[str, Any]:
    mamba = first(model).mamba
    return {"num_heads": mamba.expand * model.d_model // mamba.head_dim, "head_dim": mamba.head_dim}


def _heads_back(hf: Hf) -> dict[str, Any]:
    expand, heads, head_dim = hf.get("expand", 2), hf.get("num_heads", 128), hf.get("head_dim", 64)
    if heads * head_dim != expand * hf["hidden_size"]:
        heads_given = f"num_heads = {heads} of head_dim = {head_dim}"
        raise ValueError(f"{heads_given} are not the {expand} * {hf['hidden_size']} channels of expand * hidden_size")
    return {"mamba.head_dim": head_dim}


HEADS = Setting(_heads_out, _heads_back, "num_heads")
"""`num_heads` of `head_dim` channels are all channels."""

_INFINITIES = (math.inf, {"__float__": "Infinity"})
UNBOUNDED = fixed("time_step_limit", None, [[low, high] for low in (0.0, 0) for high in _INFINITIES])
"""A step size has no limits but its softplus; transformers 4 and 5 write infinity in two ways."""


FAMILY = Family(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    rows=rows,
    settings=(
        *BLOCKS,
        HEADS,
        own("state_size", "mamba.d_state", 128),
        own("n_groups", "mamba.n_groups", 8),
        UNBOUNDED,
        key("tie_word_embeddings", "tie_embeddings", False),
        always("pattern", ["mamba2"]),
    ),
    embedding="backbone.embeddings.weight",
    inert=("chunk_size",),
)
