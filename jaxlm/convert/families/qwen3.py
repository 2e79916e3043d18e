"""The layout of Hugging Face's Qwen3ForCausalLM: Qwen2 with RMS-normalised queries and keys."""

from __future__ import annotations

from jaxlm.convert.families import llama
from jaxlm.convert.families.qwen2 import QWEN
from jaxlm.convert.family import Family
from jaxlm.convert.settings import always, biases, key

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=llama.rows,
    settings=(
        *QWEN,
        key("head_dim", "head_dim", 128),
        biases("attention_bias", ("qkv", "attention_out")),
        always("qk_norm", True),
    ),
    ignored=llama.FAMILY.ignored,
)
