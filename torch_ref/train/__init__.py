"""Training in PyTorch, on one device. `jaxlm.train` has the same names in JAX."""
