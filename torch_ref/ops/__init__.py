"""Pure functions of tensors. No parameters. `jaxlm.ops` has the same names in JAX."""
