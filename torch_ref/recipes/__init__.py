"""The objectives of the training stages in PyTorch. `jaxlm.recipes` has the same names in JAX."""
