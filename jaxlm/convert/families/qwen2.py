"""The layout of Hugging Face's Qwen2ForCausalLM (Qwen 1.5 to 2.5): Llama with biases of queries, keys and values, and a
sliding window in some layers."""

from __future__ import annotations

from jaxlm.convert.families import llama
from jaxlm.convert.families.windows import SOMEWHERE
from jaxlm.convert.family import Family
from jaxlm.convert.settings import Setting, always, fixed, key, says

QWEN: tuple[Setting, ...] = (
    *llama.DENSE,
    key("rms_norm_eps", "norm_eps", 1e-6),
    key("max_position_embeddings", "max_seq_len", 32768),
    key("tie_word_embeddings", "tie_embeddings", False),
    llama.rope(),
    SOMEWHERE,
    fixed("use_mrope", None, (False,)),
    says("attention_dropout", 0.0),
)
"""Settings of the dense Qwens."""

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=llama.rows,
    settings=(*QWEN, llama.HEAD_DIM, always("biases", ["qkv"])),
    ignored=llama.FAMILY.ignored,
)
