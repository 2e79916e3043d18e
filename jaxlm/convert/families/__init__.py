"""Public weight layouts: one file each, which holds its rows and how its config.json says what our config says."""

from __future__ import annotations

from collections.abc import Mapping

from jaxlm.convert.families import gpt2, llama, mistral, qwen2, qwen3
from jaxlm.convert.family import Family

FAMILIES: Mapping[str, Family] = {
    one.name: one
    for one in (
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gpt2.FAMILY,
    )
}
"""`model_type` of config.json to the family; `--to hf` takes the first that can hold the model."""
