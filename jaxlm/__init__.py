"""jaxlm: one language model, provably the same in JAX and in PyTorch.

Importing the package imports neither jax nor torch; the verbs of `jaxlm.cli` load what they need.
"""

__version__ = "0.1.0"
