"""Weights between jaxlm, torch_ref and public layouts: rows of names, safetensors in and out."""
