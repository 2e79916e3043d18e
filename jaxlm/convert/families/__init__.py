"""Public weight layouts: one file each, which holds its rows and how its config.json says what our config says."""

from __future__ import annotations

from collections.abc import Mapping

from jaxlm.convert.families import (
    dots1,
    gpt2,
    gpt_oss,
    jamba,
    llama,
    mamba,
    mamba2,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from jaxlm.convert.family import Family

FAMILIES: Mapping[str, Family] = {
    one.name: one
    for one in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gpt2.FAMILY,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        gpt_oss.FAMILY,
        dots1.FAMILY,
        mamba.FAMILY,
        mamba2.FAMILY,
        jamba.FAMILY,
    )
}
"""`model_type` of config.json to the family; `--to hf` takes the first that can hold the model."""

_MLA = "its attention keeps a latent in place of keys and values (MLA), which jaxlm cannot express yet"
REFUSED: Mapping[str, str] = {"deepseek_v2": _MLA, "deepseek_v3": _MLA}
"""`model_type` of layouts that jaxlm knows and cannot compute, and why."""
