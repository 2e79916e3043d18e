"""Dtypes: one policy object, and the rule for what stays wide."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from jaxlm import config


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is computed in which dtype."""

    params: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    matmul: str = "default"
    """For `torch.set_float32_matmul_precision`, which whoever owns the process calls unless this is `default`."""

    @classmethod
    def from_config(cls, numerics: config.Numerics) -> Policy:
        """The policy of `[numerics]`."""
        return cls(getattr(torch, numerics.params), getattr(torch, numerics.compute), numerics.matmul)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, softmax and loss for inputs of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def wide_matmul(a: Float[Tensor, "*l i j"], b: Float[Tensor, "*r j k"]) -> Float[Tensor, "*b i k"]:
    """`a @ b` summed and returned wide. Products of bfloat16 numbers are exact in float32, so only the sum rounds."""
    width = wide(a.dtype)
    return (a.to(width) @ b.to(width)).to(width)  # the last cast: autocast multiplies in its own dtype
