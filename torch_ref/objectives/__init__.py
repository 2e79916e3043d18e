"""Pure losses of tensors. No model. `jaxlm.objectives` has the same names in JAX."""
