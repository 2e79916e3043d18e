"""Attention. `jaxlm.ops.attention` has the same names in JAX."""
