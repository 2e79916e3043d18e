"""The layout of Hugging Face's MistralForCausalLM: Llama with a sliding window in every layer, and without biases."""

from __future__ import annotations

from jaxlm.convert.families import llama
from jaxlm.convert.families.windows import Everywhere
from jaxlm.convert.family import Family
from jaxlm.convert.settings import Key, Says

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    rows=llama.rows,
    settings=(
        *llama.DENSE,
        llama.HEAD_DIM,
        Key("rms_norm_eps", "norm_eps", 1e-6),
        Key("max_position_embeddings", "max_seq_len", 131072),
        Key("tie_word_embeddings", "tie_embeddings", False),
        llama.Rope(),
        Everywhere(4096),
        Says("attention_dropout", 0.0),
    ),
    ignored=llama.FAMILY.ignored,
)
