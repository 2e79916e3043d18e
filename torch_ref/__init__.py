"""The same models as `jaxlm`, in PyTorch: the same files, classes and functions, and no JAX."""
