"""Dtypes and matrix-product precision: one policy object, and the rule for what stays wide."""

from __future__ import annotations

import dataclasses

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
