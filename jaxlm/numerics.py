"""Dtypes and matrix-product precision: one policy object, the rule for what stays wide, the context of float64."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlm import config

_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is computed in which dtype. Hashable, so that a module can hold it."""

    params: np.dtype = _FLOAT32
    compute: np.dtype = _FLOAT32
    matmul: str = "default"

    @classmethod
    def from_config(cls, numerics: config.Numerics) -> Policy:
        """The policy of `[numerics]`."""
        return cls(jnp.dtype(numerics.params), jnp.dtype(numerics.compute), numerics.matmul)


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of statistics, softmax and loss for inputs of `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def precision(numerics: config.Numerics) -> contextlib.AbstractContextManager[None]:
    """A context in which arrays keep float64 if `numerics` ask for it or the process has it on; else JAX narrows them.

    Only this thread sees it, and `jax.config` is as before when it ends.
    """
    return jax.enable_x64("float64" in (numerics.params, numerics.compute) or bool(jax.config.read("jax_enable_x64")))
