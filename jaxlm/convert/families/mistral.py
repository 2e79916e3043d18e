"""The layout of Hugging Face's MistralForCausalLM: Llama with a sliding window in every layer, and without biases."""

from __future__ import annotations

from jaxlm.convert.families import llama
from jaxlm.convert.families.windows import everywhere
from jaxlm.convert.family import Family
from jaxlm.convert.settings import key, says

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    rows=llama.rows,
    settings=(
        *llama.DENSE,
        llama.HEAD_DIM,
        key("rms_norm_eps", "norm_eps", 1e-6),
        key("max_position_embeddings", "max_seq_len", 131072),
        key("tie_word_embeddings", "tie_embeddings", False),
        llama.rope(),
        everywhere(4096),
        says("attention_dropout", 0.0),
    ),
    ignored=llama.FAMILY.ignored,
)
