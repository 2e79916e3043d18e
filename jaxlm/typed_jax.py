"""Functions of JAX with complete types.

Each calls JAX's function of the same name; some fix options (`tiled`, `keepdims`) that no op varies. JAX leaves parts
of their signatures untyped. With these, pyright (strict) sees what enters and leaves an op. A tree is a nested tuple or
dict of arrays; what JAX does to each leaf keeps the type of the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
Axis = str | tuple[str, ...]
"""A mesh axis, or several as one."""


@runtime_checkable
class CustomVJP(Protocol[P, R_co]):
    """A function with a gradient of its own."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def defvjp(self, forward: Callable[P, tuple[Any, Any]], backward: Callable[..., tuple[Any, ...]], /) -> object:
        """Set both passes.

        Args:
            forward: takes what the function takes, and returns its result and what the backward pass needs.
            backward: takes the arguments without a gradient, what `forward` kept, and the gradient of the result; it
                returns a gradient for each other argument, None for integers.
        """
        ...


def custom_vjp(*without_gradient: int) -> Callable[[Callable[P, R]], CustomVJP[P, R]]:
    """The decorator `jax.custom_vjp`, with the numbers of the arguments that are no arrays."""

    def decorate(function: Callable[P, R]) -> CustomVJP[P, R]:
        return cast(CustomVJP[P, R], jax.custom_vjp(function, without_gradient))

    return decorate


def matmul_precision() -> str:
    """The precision of products that name none: that of the `jax.default_matmul_precision` around them."""
    config = cast(Any, jax.config)
    return config.jax_default_matmul_precision or "default"


def checkpoint(function: Callable[P, R]) -> Callable[P, R]:
    """`jax.checkpoint`: the backward pass computes the function anew."""
    return jax.checkpoint(function)


def vjp(function: Callable[..., R], *primals: Any) -> tuple[R, Callable[[R], Any]]:
    """`jax.vjp`: the value, and the map from its gradient to a tuple of gradients, one for each argument."""
    return jax.vjp(function, *primals)


def value_and_grad(
    function: Callable[P, tuple[Array, T]], argnums: tuple[int, ...]
) -> Callable[P, tuple[tuple[Array, T], tuple[Array, ...]]]:
    """`jax.value_and_grad` of a function that returns a value and something beside it, by several arrays."""
    return jax.value_and_grad(function, argnums, has_aux=True)


@overload
def tree_map(function: Callable[[Array], Array], tree: T, /) -> T: ...
@overload
def tree_map(function: Callable[[Array, Array], Array], tree: T, other: T, /) -> T: ...
def tree_map(function: Callable[..., Array], *trees: Any) -> Any:
    """`jax.tree.map` for trees of one type."""
    return jax.tree.map(function, *trees)


def fori_loop(lower: int | Array, upper: int | Array, body: Callable[[Array, T], T], state: T) -> T:
    """`jax.lax.fori_loop`."""
    return jax.lax.fori_loop(lower, upper, body, state)


def cond(wanted: Array, then: Callable[[T], R], otherwise: Callable[[T], R], operand: T) -> R:
    """`jax.lax.cond` of one operand."""
    return jax.lax.cond(wanted, then, otherwise, operand)


def einsum(
    subscripts: str, *operands: ArrayLike, precision: str | None = None, preferred_element_type: DTypeLike | None = None
) -> Array:
    """`jnp.einsum`."""
    return jnp.einsum(subscripts, *operands, precision=precision, preferred_element_type=preferred_element_type)


def pad(
    array: ArrayLike,
    pad_width: int | Sequence[int] | Sequence[Sequence[int]],
    mode: str = "constant",
    constant_values: ArrayLike | None = None,
) -> Array:
    """`jnp.pad`; without `constant_values`, constants are zero."""
    if constant_values is None:
        return jnp.pad(array, pad_width, mode)
    return jnp.pad(array, pad_width, mode, constant_values=constant_values)


def put_along_axis(array: Array, indices: Array, values: ArrayLike, axis: int) -> Array:
    """`jnp.put_along_axis`, which returns the new array."""
    return jnp.put_along_axis(array, indices, values, axis=axis, inplace=False)


def finfo(dtype: DTypeLike) -> np.finfo[Any]:
    """`jnp.finfo`, which knows bfloat16 too."""
    return cast("np.finfo[Any]", jnp.finfo(dtype))


def broadcasted_iota(dtype: DTypeLike, shape: Sequence[int], dimension: int) -> Array:
    """`jax.lax.broadcasted_iota`."""
    return jax.lax.broadcasted_iota(dtype, shape, dimension)


def dynamic_index_in_dim(array: Array, index: Array, axis: int = 0) -> Array:
    """`jax.lax.dynamic_index_in_dim`, without the axis."""
    return jax.lax.dynamic_index_in_dim(array, index, axis, keepdims=False)


def dynamic_update_index_in_dim(array: Array, update: Array, index: Array, axis: int = 0) -> Array:
    """`jax.lax.dynamic_update_index_in_dim`."""
    return jax.lax.dynamic_update_index_in_dim(array, update, index, axis)


def platform_dependent(*arrays: Array, tpu: Callable[..., Array], default: Callable[..., Array]) -> Array:
    """`jax.lax.platform_dependent` with one function for TPUs."""
    return jax.lax.platform_dependent(*arrays, tpu=tpu, default=default)


def optimization_barrier(array: Array) -> Array:
    """`jax.lax.optimization_barrier`: the compiler moves nothing across it."""
    return jax.lax.optimization_barrier(array)


def ppermute(tree: T, axis: Axis, pairs: Sequence[tuple[int, int]]) -> T:
    """`jax.lax.ppermute`: from which device to which."""
    return jax.lax.ppermute(tree, axis, pairs)


def all_gather(tree: T, axis_name: Axis, *, axis: int = 0, tiled: bool = False) -> T:
    """`jax.lax.all_gather`."""
    return jax.lax.all_gather(tree, axis_name, axis=axis, tiled=tiled)


def all_to_all(array: Array, axis_name: Axis) -> Array:
    """`jax.lax.all_to_all` along the first axis: part p goes to device p."""
    return jax.lax.all_to_all(array, axis_name, split_axis=0, concat_axis=0, tiled=True)


def psum_scatter(array: Array, axis_name: Axis) -> Array:
    """`jax.lax.psum_scatter` along the first axis."""
    return jax.lax.psum_scatter(array, axis_name, scatter_dimension=0, tiled=True)


def pmax(array: Array, axis_name: Axis) -> Array:
    """`jax.lax.pmax`."""
    return jax.lax.pmax(array, axis_name)
