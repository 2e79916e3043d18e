"""Mixture of experts. `jaxlm.ops.moe` has the same names in JAX."""
