"""Modules that own parameters. The mathematics is in `torch_ref.ops`; `jaxlm.models` has the same names in JAX."""
