"""The implementations that can be compared: jaxlm, torch_ref, transformers."""
