"""Mamba (state-spaces/mamba-130m-hf and its larger siblings).

transformers keeps the residual stream in float32 when config.json says `residual_in_fp32`, ours is in the compute
dtype. That is rounding, not mathematics: a file may say either, and what we write says false, as we compute.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.convert.family import Family, sizes
from jaxlm.convert.rows import Row, flat, matrix, of_each
from jaxlm.convert.settings import Hf, Setting, always, fixed, key, says

taps = of_each(
    lambda kernel_KF, leaf: np.swapaxes(kernel_KF, 0, 1)[:, None],
    lambda weight_F1K, leaf: np.swapaxes(weight_F1K[:, 0], 0, 1),
)
"""Kernel [K, F] of a causal convolution to the weight [F, 1, K] of `torch.nn.Conv1d`."""


def rows(cfg: config.Model) -> list[Row]:
    """See `outer_rows` and `mixer_rows`."""
    return [*outer_rows(), *mixer_rows("backbone.layers.{i}.mixer")]


def outer_rows() -> list[Row]:
    """Embedding, norms and head of blocks without a feed-forward."""
    return [
        Row("embed.embedding", "backbone.embeddings.weight"),
        Row("layers.{i}.mixer_norm.scale", "backbone.layers.{i}.norm.weight"),
        Row("final_norm.scale", "backbone.norm_f.weight"),
        Row("head.kernel", "lm_head.weight", matrix),
    ]


def mixer_rows(theirs: str) -> list[Row]:
    """The mixer of Mamba, with the inner norms of Jamba where there are any."""
    ours = "layers.{i}.mixer"
    return [
        Row(f"{ours}.in_proj.kernel", f"{theirs}.in_proj.weight", matrix),
        Row(f"{ours}.in_proj.bias", f"{theirs}.in_proj.bias", flat),
        Row(f"{ours}.conv.kernel", f"{theirs}.conv1d.weight", taps),
        Row(f"{ours}.conv.bias", f"{theirs}.conv1d.bias"),
        Row(f"{ours}.x_proj.kernel", f"{theirs}.x_proj.weight", matrix),
        *(Row(f"{ours}.{name}_norm.scale", f"{theirs}.{name}_layernorm.weight") for name in ("dt", "b", "c")),
        Row(f"{ours}.dt_proj.kernel", f"{theirs}.dt_proj.weight", matrix),
        Row(f"{ours}.dt_proj.bias", f"{theirs}.dt_proj.bias"),
        Row(f"{ours}.A_log", f"{theirs}.A_log"),
        Row(f"{ours}.D", f"{theirs}.D"),
        Row(f"{ours}.out_proj.kernel", f"{theirs}.out_proj.weight", matrix),
        Row(f"{ours}.out_proj.bias", f"{theirs}.out_proj.bias"),
    ]


def first(model: config.Model) -> config.Model:
    """The model as its first Mamba block sees it, with what is 0 filled in."""
    blocks = (model.halves(kind) for kind in model.pattern)
    mixers = (block.mixer for block in blocks if block.mixer_name.startswith("mamba"))
    return next(mixers, model.halves("mamba").mixer)


own = functools.partial(key, of=first)
"""A `key` of the Mamba blocks, which may have set the option for their own."""


def rank(theirs: str = "time_step_rank") -> Setting:
    """The width of the bottleneck of the step size, a number or `auto`."""
    number = own(theirs, "mamba.dt_rank", 0)
    return number._replace(back=lambda hf: {"mamba.dt_rank": 0} if hf.get(theirs) == "auto" else number.back(hf))


def _inner_back(hf: Hf) -> dict[str, Any]:
    inner = hf.get("expand", 2) * hf["hidden_size"]
    if hf.get("intermediate_size", inner) != inner:
        raise ValueError(f"intermediate_size = {hf['intermediate_size']} is not expand * hidden_size = {inner}")
    return {}


INNER = Setting(
    lambda model: {"intermediate_size": first(model).mamba.expand * model.d_model}, _inner_back, "intermediate_size"
)
"""The channels of the scan, which `expand` says already."""

BLOCKS: tuple[Setting, ...] = (
    *sizes(vocab_size="vocab_size", hidden_size="d_model", num_hidden_layers="n_layers"),
    own("conv_kernel", "mamba.d_conv", 4),
    own("expand", "mamba.expand", 2),
    own("use_bias", "mamba.proj_bias", False),
    own("use_conv_bias", "mamba.conv_bias", True),
    rank(),
    own("time_step_min", "mamba.dt_min", 1e-3),
    own("time_step_max", "mamba.dt_max", 1e-1),
    own("time_step_floor", "mamba.dt_floor", 1e-4),
    key("initializer_range", "init_std", 0.1),
    key("layer_norm_epsilon", "norm_eps", 1e-5),
    fixed("hidden_act", "silu", ("swish",)),
    fixed("rms_norm", None, (True,)),
    says("rescale_prenorm_residual", False),  # of the first weights; transformers 5 rescales what it has loaded, too
    says("residual_in_fp32", False),
    always("positions", "none"),
)
"""Settings that Mamba and Mamba-2 share."""

FAMILY = Family(
    name="mamba",
    architecture="MambaForCausalLM",
    rows=rows,
    settings=(
        *BLOCKS,
        INNER,
        own("state_size", "mamba.d_state", 16),
        key("tie_word_embeddings", "tie_embeddings", True),
        always("pattern", ["mamba"]),
    ),
    embedding="backbone.embeddings.weight",
    inert=("time_step_init_scheme", "time_step_scale", "use_associative_scan", "use_mambapy"),
    old_names={"backbone.embedding.weight": "backbone.embeddings.weight"},
)
