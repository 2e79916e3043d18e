"""The parts with parameters of their own: linear maps, embeddings, norms.

Shapes: B batch, T length, D width, V vocabulary; `in` and `out` stand for one or more axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.mesh import constrain, unsplit
from jaxlm.models import adapted
from jaxlm.numerics import Policy, wide
from jaxlm.ops import norm


def logical(init: Callable, *axes: str | None) -> Callable:
    """An initialiser whose array carries the names of its axes."""
    return nn.with_logical_partitioning(init, axes)


class Linear(nn.Module):
    """`x @ kernel (+ bias)` over the last `n_in` axes of x, in the compute dtype. Kernel [in..., out...]."""

    features: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float
    policy: Policy
    n_in: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[x.ndim - self.n_in :] + self.features
        compute = self.policy.compute
        kernel = adapted.stored_kernel(self, shape, self.n_in)
        if kernel is None:
            init = logical(nn.initializers.normal(self.std), *self.axes)
            kernel = self.param("kernel", init, shape, self.policy.params)
        kernel = kernel.astype(compute)
        leading = x.shape[: x.ndim - self.n_in]
        if unsplit():  # one axis of tokens: XLA:CPU copies and transposes the operands of a gradient that sums over two
            x = x.reshape(-1, *x.shape[x.ndim - self.n_in :])
        y = jnp.tensordot(x.astype(compute), kernel, axes=self.n_in)
        y = adapted.adapted(self, x, y, kernel, inputs=self.n_in, compute=compute)
        y = y.reshape(*leading, *self.features)
        if self.use_bias:
            zeros = logical(nn.initializers.zeros, *self.axes[self.n_in :])
            bias = self.param("bias", zeros, self.features, self.policy.params).astype(self.policy.compute)
            width = wide(self.policy.compute)  # the bias's gradient is a sum over tokens: XLA would round each addition
            y = (y.astype(width) + bias.astype(width)).astype(self.policy.compute)
        return y


class Embed(nn.Module):
    """A table of vectors [rows, D]; the axis of its rows is `axis`."""

    rows: int
    d_model: int
    axis: str | None
    std: float
    policy: Policy

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(self.std), (self.axis, "embed"))
        self.embedding: Any = self.param("embedding", init, (self.rows, self.d_model), self.policy.params)

    def __call__(self, ids_BT: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        table = constrain(self.embedding, self.axis, "features")  # gather the width, so that the look-up stays local
        return jnp.take(table, ids_BT, axis=0).astype(self.policy.compute)


class Head(nn.Module):
    """The output matrix of an untied decoder, or of a head that scores: `kernel` [D, V] and `bias` [V] or None."""

    d_model: int
    outputs: int
    std: float
    policy: Policy
    use_bias: bool
    axis: str | None = "vocab"

    def setup(self) -> None:
        init = logical(nn.initializers.normal(self.std), "embed", self.axis)
        self.kernel = self.param("kernel", init, (self.d_model, self.outputs), self.policy.params)
        zeros = logical(nn.initializers.zeros, self.axis)
        self.bias = self.param("bias", zeros, (self.outputs,), self.policy.params) if self.use_bias else None


class Norm(nn.Module):
    """RMS or layer normalisation of the last axis, by name."""

    kind: str
    eps: float
    policy: Policy
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        width = (x.shape[-1],)
        scale_D = self.param("scale", logical(nn.initializers.ones, self.axis), width, self.policy.params)
        if self.kind == "rmsnorm":
            return norm.rms_norm(x, scale_D, eps=self.eps)
        bias_D = self.param("bias", logical(nn.initializers.zeros, self.axis), width, self.policy.params)
        return norm.layer_norm(x, scale_D, bias_D, eps=self.eps)
