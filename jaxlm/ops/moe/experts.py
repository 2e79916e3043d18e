"""The experts of a mixture: each token passes the feed-forwards that its router chose, and their outputs are summed.

`naive` computes every expert for every token, masked: the readable reference, which costs E / K times too much.
`blocks`, `ragged` and `megablox` sort the assignments by expert and compute those alone; nothing is dropped and every
shape is static. The weight of an assignment multiplies the hidden layer, which by linearity is to multiply the output.

Shapes: T tokens, D width, F width of one expert, E experts, K experts of one token, R = T K assignments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.errors import UserError
from jaxlm.numerics import wide
from jaxlm.ops import ffn
from jaxlm.ops.moe.dispatch import Plan, collect, pick, sort_by_expert, take
from jaxlm.ops.moe.grouped_matmul import GROUPED, grouped_dot
from jaxlm.typed_jax import (
    custom_vjp,
    dynamic_index_in_dim,
    dynamic_update_index_in_dim,
    fori_loop,
    pad,
    tree_map,
    vjp,
)

_State = TypeVar("_State")


class Experts(NamedTuple):
    """The weights of all experts; `gate` is None for activations of one matrix, biases may be None."""

    gate: Float[Array, "e d f"] | None
    up: Float[Array, "e d f"]
    down: Float[Array, "e f d"]
    gate_bias: Float[Array, "e f"] | None = None
    up_bias: Float[Array, "e f"] | None = None
    down_bias: Float[Array, "e d"] | None = None


def moe(
    x_TD: Float[Array, "t d"],
    weights_TK: Float[Array, "t k"],
    experts_TK: Int[Array, "t k"],
    parameters: Experts,
    *,
    activation: str,
    impl: str = "auto",
    platform: str | None = None,
) -> Float[Array, "t d"]:
    """`sum_k weight_k expert_k(x)` for each token (Shazeer et al. 2017, equation 1), in the dtype of x.

    Args:
        weights_TK: float32 or wider.
        experts_TK: the chosen experts; E or more: none.
        activation: a name of `ops.ffn`.
        impl: `naive`, `blocks`, `ragged`, `megablox` (TPUs), or `auto` for the hardware.
        platform: what is compiled for, `cpu`, `gpu` or `tpu`; None: the default platform of this process.
    """
    impl = choose(impl, platform or jax.default_backend(), x_TD.dtype)
    if impl == "naive":
        return _naive(x_TD, weights_TK, experts_TK, parameters, activation)
    if impl == "blocks":
        return _blocks(x_TD, weights_TK, experts_TK, parameters, activation)
    if impl in GROUPED:
        return _grouped(impl, x_TD, weights_TK, experts_TK, parameters, activation)
    raise ValueError(f"unknown implementation {impl!r}")


def choose(asked: str, platform: str, dtype: Any) -> str:
    """The implementation of a mixture of experts: the one asked for, or under `auto` the fastest of the platform.

    TPUs have the kernel `megablox`. XLA's own `ragged_dot` takes the gradient of the kernels as if every row passed
    every expert, and on GPUs and CPUs all products, so there the rows are computed in `blocks` (docs/experts.md).

    Raises:
        UserError: `megablox` is asked for where it does not apply.
    """
    fits = platform == "tpu" and dtype in (jnp.bfloat16, jnp.float32)
    if asked == "megablox" and not fits:
        why = "it computes in bfloat16 or float32" if platform == "tpu" else f"it runs on tpu, not on {platform}"
        raise UserError(f"model.moe.impl = 'megablox' does not apply here: {why}", "`auto` takes what does")
    if asked == "auto":
        return "megablox" if fits else "blocks"
    return asked


def _activate(activation: str, gate: Array | None, up: Array) -> Array:
    return ffn.activate(activation, up) if gate is None else ffn.gated(activation, gate, up)


def _plus(y: Array, bias: Array | None) -> Array:
    """`y + bias`, added wide as in `layers.Linear`."""
    return y if bias is None else (y.astype(wide(y.dtype)) + bias.astype(wide(y.dtype))).astype(y.dtype)


def _times(y: Array, weights: Array) -> Array:
    """Rows of y times their weights, multiplied wide."""
    return (y.astype(weights.dtype) * weights[:, None]).astype(y.dtype)


def _hidden(x: Array, one: Experts) -> tuple[Array | None, Array]:
    """Both pre-activations of one expert."""
    return (None if one.gate is None else _plus(x @ one.gate, one.gate_bias)), _plus(x @ one.up, one.up_bias)


def _down(hidden: Array, weights: Array, one: Experts) -> Array:
    """What one expert adds to the output, wide."""
    y = jnp.matmul(_times(hidden, weights), one.down, preferred_element_type=weights.dtype)
    return y if one.down_bias is None else y + weights[:, None] * one.down_bias.astype(weights.dtype)


def _naive(x_TD: Array, weights_TK: Array, experts_TK: Array, parameters: Experts, activation: str) -> Array:
    y_TD = jnp.zeros(x_TD.shape, weights_TK.dtype)
    for e in range(parameters.up.shape[0]):

        def of_expert(p: Array, e: int = e) -> Array:
            return p[e]

        one = tree_map(of_expert, parameters)
        # The weight of this expert for each token, zero where the token did not choose it: multiplying by zero replaces
        # the selection of rows, so every shape is that of the whole batch.
        weights_T = jnp.sum(jnp.where(experts_TK == e, weights_TK, 0), axis=-1)
        y_TD = y_TD + _down(_activate(activation, *_hidden(x_TD, one)), weights_T, one)
    return y_TD.astype(x_TD.dtype)


def _combine(y_RD: Array, plan: Plan, dtype: Any) -> Array:
    """The sum of each token's rows; those of no expert are zero."""
    # Rows behind the last end belong to no expert. The last block of the last expert may have written into them, so
    # they are replaced and not multiplied by zero, which would keep a NaN.
    y_TKD = jnp.where((plan.rows < plan.ends[-1])[..., None], take(y_RD, plan.rows), 0)
    return jnp.sum(y_TKD, axis=1).astype(dtype)


def _grouped(
    impl: str, x_TD: Array, weights_TK: Array, experts_TK: Array, parameters: Experts, activation: str
) -> Array:
    """One grouped matrix product for each kernel: GPUs and TPUs have it."""
    (n_tokens, top_k), n_experts = experts_TK.shape, parameters.up.shape[0]
    plan, wide_type = sort_by_expert(experts_TK, n_experts), weights_TK.dtype
    sizes = jnp.diff(plan.ends, prepend=0)
    # where each row comes from and each assignment went; those of no expert come from and go nowhere
    carried_R = jnp.arange(plan.order.size) < plan.ends[-1]
    token_R = jnp.where(carried_R, plan.order // top_k, n_tokens)
    assignment_R = jnp.where(carried_R, plan.order, plan.order.size)
    back_TK = jnp.where(plan.rows < plan.ends[-1], plan.rows, plan.order.size)
    # `pick` and `collect` are each other's gradients, so no pass scatters with additions. The weights are picked as
    # rows of width one for the same reason.
    x_RD = pick(x_TD, token_R, back_TK)
    weights_R = pick(weights_TK.reshape(-1, 1), assignment_R, back_TK.reshape(-1, 1))[:, 0]
    # Biases are read by row. Rows of no expert read those of the last one; `collect` leaves these rows out.
    expert_R = jnp.minimum(take(experts_TK.reshape(-1), plan.order), n_experts - 1)

    def of_row(bias: Array | None) -> Any:  # wide, since its gradient is a sum over rows
        return None if bias is None else bias.astype(wide_type)[expert_R]

    def linear(x: Array, kernel: Array, bias: Array | None) -> Array:
        return _plus(grouped_dot(x, kernel, sizes, impl=impl), of_row(bias))

    gate_RF = None if parameters.gate is None else linear(x_RD, parameters.gate, parameters.gate_bias)
    hidden_RF = _activate(activation, gate_RF, linear(x_RD, parameters.up, parameters.up_bias))
    y_RD = grouped_dot(_times(hidden_RF, weights_R), parameters.down, sizes, impl=impl, dtype=wide_type)
    if parameters.down_bias is not None:
        y_RD = y_RD + weights_R[:, None] * of_row(parameters.down_bias)
    return collect(y_RD, back_TK, token_R).astype(x_TD.dtype)


# Blocks: a loop over the experts that have rows, and for each a loop over blocks of its rows, first large ones and then
# small ones for the rest. Only trip counts depend on the data. The last block of an expert reaches into the rows of the
# next one, which overwrites them, since experts come in order; so a forward pass needs no mask.


def _sizes(rows: int, n_experts: int) -> tuple[int, int]:
    """Rows of a large and of a small block: small enough that few rows are computed in vain."""
    # A block computes up to its size minus one rows in vain for each expert, so it grows only while an expert has 16
    # blocks of rows on average.
    small = 8
    while small < 128 and 16 * small * n_experts <= rows:
        small *= 2
    return 4 * small, small


def _unchanged(_: Array, state: _State) -> _State:
    return state


def _over_blocks(
    plan: Plan,
    parameters: Experts,
    start: _State,
    body: Callable[[_State, Experts, Array, int, Array], _State],
    finish: Callable[[Array, _State], _State] = _unchanged,
) -> _State:
    """`state = body(state, one, first row, rows, end)` for every block, and `finish(e, state)` after each expert."""
    n_experts = parameters.up.shape[0]
    sizes = _sizes(plan.order.size, n_experts)
    starts = jnp.concatenate([jnp.zeros(1, plan.ends.dtype), plan.ends[:-1]])
    used = plan.ends > starts
    active = jnp.argsort(~used, stable=True)  # those with rows, in order: the weights of the others are not read

    def expert(i: Array, state: _State) -> _State:
        e = active[i]
        one = tree_map(lambda p: dynamic_index_in_dim(p, e), parameters)
        row, end = starts[e], plan.ends[e]
        # Large blocks first; the rest takes small ones, of which the last may be partly empty: hence the quotient is
        # rounded up for the last size alone.
        for size in sizes:
            blocks = (end - row) // size if size != sizes[-1] else -((row - end) // size)

            def block(j: Array, state: _State, row: Array = row, size: int = size) -> _State:
                return body(state, one, row + j * size, size, end)

            state = fori_loop(0, blocks, block, state)
            row = row + blocks * size
        return finish(e, state)

    return fori_loop(0, jnp.sum(used), expert, start)


def _sorted(x: Array, indices: Array, spare: int) -> Array:
    """Rows of x, and `spare` more for the last block to reach into."""
    return take(x, pad(indices, (0, spare)))


@overload
def _rows_of(array: Array, row: Array, size: int) -> Array: ...
@overload
def _rows_of(array: None, row: Array, size: int) -> None: ...
def _rows_of(array: Array | None, row: Array, size: int) -> Array | None:
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, row, size)


@overload
def _set_rows(array: Array, rows: Array | None, row: Array) -> Array: ...
@overload
def _set_rows(array: None, rows: Array | None, row: Array) -> None: ...
def _set_rows(array: Array | None, rows: Array | None, row: Array) -> Array | None:
    if array is None or rows is None:
        return array
    return jax.lax.dynamic_update_slice_in_dim(array, rows, row, axis=0)


Forward = tuple[Array | None, Array | None, Array]
"""Both pre-activations [R, F], if they are kept, and the output [R, D], as far as the blocks have come."""
Backward = tuple[Array, Array, Experts, Experts]
"""Gradients of rows [R, D] and weights [R], of the parameters of this expert, and of those of all."""
Kept = tuple[Array, Array, Plan, Experts, Array | None, Array | None]
"""Tokens, weights, plan, parameters, and both pre-activations; that of the gate may be None."""


def _over_rows(rows: Array, width: DTypeLike) -> Array:
    return jnp.sum(rows.astype(width), axis=0)


@custom_vjp(4)
def _blocks(x_TD: Array, weights_TK: Array, experts_TK: Array, parameters: Experts, activation: str) -> Array:
    return _blocks_forward(x_TD, weights_TK, experts_TK, parameters, activation, keep=False)[0]


def _blocks_forward(
    x_TD: Array, weights_TK: Array, experts_TK: Array, parameters: Experts, activation: str, keep: bool = True
) -> tuple[Array, Kept]:
    plan, top_k = sort_by_expert(experts_TK, parameters.up.shape[0]), experts_TK.shape[1]
    spare = _sizes(plan.order.size, parameters.up.shape[0])[0]
    x = _sorted(x_TD, plan.order // top_k, spare)
    weights = _sorted(weights_TK.reshape(-1), plan.order, spare)
    # The backward pass needs both pre-activations; they are kept, 2 R F numbers, and not computed again. Without a
    # gradient (`keep` is false) none of it is allocated.
    pre_activation = jnp.zeros((len(x), parameters.up.shape[2]), x.dtype) if keep else None
    gate = None if parameters.gate is None else pre_activation

    def body(state: Forward, one: Experts, row: Array, size: int, end: Array) -> Forward:
        gates, ups, y = state
        gate, up = _hidden(_rows_of(x, row, size), one)
        out = _down(_activate(activation, gate, up), _rows_of(weights, row, size), one)
        return _set_rows(gates, gate, row), _set_rows(ups, up, row), _set_rows(y, out.astype(y.dtype), row)

    start = (gate, pre_activation, jnp.zeros(x.shape, weights.dtype))
    gates, ups, y = _over_blocks(plan, parameters, start, body)
    return _combine(y, plan, x.dtype), (x_TD, weights_TK, plan, parameters, gates, ups)


def _blocks_backward(activation: str, kept: Kept, dy_TD: Array) -> tuple[Array, Array, None, Experts]:
    x_TD, weights_TK, plan, parameters, gates, ups = kept
    assert ups is not None
    top_k, dtype, width = weights_TK.shape[1], x_TD.dtype, weights_TK.dtype
    spare = _sizes(plan.order.size, parameters.up.shape[0])[0]
    # dy is sorted like x: the gradient of "sum over the K rows of a token" is a copy of dy for each of them.
    x, dy = (_sorted(rows, plan.order // top_k, spare) for rows in (x_TD, dy_TD))
    weights = _sorted(weights_TK.reshape(-1), plan.order, spare)
    product = functools.partial(jnp.matmul, preferred_element_type=width)

    def body(state: Backward, one: Experts, row: Array, size: int, end: Array) -> Backward:
        dx, dweights, total, gradients = state
        # The backward pass adds into the gradients of the weights, so rows that belong to the next expert must count
        # zero here. Forward they need no mask, for the next expert overwrites them.
        mine = (row + jnp.arange(size) < end)[:, None]
        x_block, weight = _rows_of(x, row, size), _rows_of(weights, row, size)
        dy_block = jnp.where(mine, _rows_of(dy, row, size), 0)
        hidden, pull = vjp(
            functools.partial(_activate, activation), _rows_of(gates, row, size), _rows_of(ups, row, size)
        )
        # With y = weight * (h @ down): dh is weight * (dy @ down^T), and the gradient of the weight is <dy @ down^T,
        # h>. Both need the same product, which is taken once and kept wide.
        dweighted = product(dy_block, one.down.T)
        dgate, dup = pull((dweighted * weight[:, None]).astype(dtype))
        dweight = jnp.sum(dweighted * hidden.astype(width), axis=1)
        out = product(dup, one.up.T)
        if one.gate is not None:
            out = out + product(dgate, one.gate.T)
        if one.down_bias is not None:
            dweight = dweight + jnp.sum(dy_block.astype(width) * one.down_bias.astype(width), axis=1)
        # Gradients of the kernels are products over the rows of a block, added wide over the blocks of an expert and
        # rounded once in `finish`.
        new = Experts(
            None if gates is None else product(x_block.T, dgate),
            product(x_block.T, dup),
            product(_times(hidden, weight).T, dy_block),
            None if one.gate_bias is None else _over_rows(dgate, width),
            None if one.up_bias is None else _over_rows(dup, width),
            None if one.down_bias is None else _over_rows(dy_block.astype(width) * weight[:, None], width),
        )
        total = tree_map(jnp.add, total, new)
        return _set_rows(dx, out, row), _set_rows(dweights, dweight, row), total, gradients

    zeros = tree_map(lambda p: jnp.zeros(p.shape[1:], width), parameters)

    def finish(e: Array, state: Backward) -> Backward:
        dx, dweights, total, gradients = state

        def put(of_all: Array, of_one: Array) -> Array:
            return dynamic_update_index_in_dim(of_all, of_one.astype(of_all.dtype), e)

        return dx, dweights, zeros, tree_map(put, gradients, total)

    start = (jnp.zeros(x.shape, width), jnp.zeros(len(x), width), zeros, tree_map(jnp.zeros_like, parameters))
    dx, dweights, _, gradients = _over_blocks(plan, parameters, start, body, finish)
    dweights_TK = jnp.where(plan.rows < plan.ends[-1], take(dweights, plan.rows), 0)
    return _combine(dx, plan, dtype), dweights_TK, None, gradients


_blocks.defvjp(_blocks_forward, _blocks_backward)
