"""Decoding in PyTorch. `jaxlm.infer` has the same names in JAX."""
