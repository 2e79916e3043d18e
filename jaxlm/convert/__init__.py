"""Weights between jaxlm, torch_ref and public layouts: rows of names, safetensors in and out."""

FAMILY_NAMES = (
    *("llama", "mistral", "qwen2", "qwen3", "gpt2"),
    *("mixtral", "qwen3_moe", "gpt_oss", "dots1"),
    *("mamba", "mamba2", "jamba"),
)
"""`model_type` of every public layout, each a file of `families`; `--to hf` takes the first that can hold a model."""
LLAMA2C = "llama2c"
"""The layout of llama2.c's `model.bin`, which is no folder of Hugging Face's."""
