"""Sorting assignments by expert, and moving rows to and from that order.

Shapes: T tokens, D width, E experts, K experts of one token, R = T K assignments, S rows of any other order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.typed_jax import custom_vjp


class Plan(NamedTuple):
    """Assignments sorted by expert, those of one expert in the order of the tokens."""

    order: Int[Array, " r"]
    """Assignment (token K + choice) of each row."""
    rows: Int[Array, "t k"]
    """Row of each assignment."""
    ends: Int[Array, " e"]
    """First row after those of each expert; behind the last one stand the assignments that are not carried out."""


def sort_by_expert(experts_TK: Int[Array, "t k"], n_experts: int) -> Plan:
    """Sort assignments by expert; E or more: not carried out."""
    flat = experts_TK.reshape(-1)
    # The sort is stable, so the rows of one expert stay in the order of the tokens: results do not depend on the
    # sorting algorithm, and both frameworks add in the same order.
    order = jnp.argsort(flat, stable=True)
    # `rows` is the inverse of the permutation `order`. Writing 0, 1, 2 ... through it is linear, a second sort is not;
    # unique indices tell the compiler that no two writes meet.
    rows = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    # Assignments that are not carried out have the number E and sort behind all others, so the last end is also the
    # number of rows that are computed.
    ends = jnp.searchsorted(flat[order], jnp.arange(n_experts, dtype=flat.dtype), side="right")
    return Plan(order, rows.reshape(experts_TK.shape), ends.astype(jnp.int32))


def take(x: Array, rows: Array) -> Array:
    """`x[rows]`; every index is in bounds."""
    return x.at[rows].get(mode="promise_in_bounds")


# `pick` and `collect` move the same rows there and back, so that each is the gradient of the other: the transpose that
# JAX derives for an indexed read is a scatter with additions, which GPUs and TPUs do row by row.


@custom_vjp()
def pick(x_TD: Float[Array, "t d"], there_S: Int[Array, " s"], back_TK: Int[Array, "t k"]) -> Float[Array, "s d"]:
    """Row `there_S[s]` of x for each s, zeros where that is T.

    Args:
        back_TK: the inverse, for the gradient: the s that took each row of x, S for none.
    """
    return x_TD.at[there_S].get(mode="fill", fill_value=0)


@custom_vjp()
def collect(y_SD: Float[Array, "s d"], back_TK: Int[Array, "t k"], there_S: Int[Array, " s"]) -> Float[Array, "t d"]:
    """The sum over k of the rows `back_TK[t, k]` of y, nothing where that is S; `there_S` is the inverse."""
    return jnp.sum(y_SD.at[back_TK].get(mode="fill", fill_value=0), axis=1)


def _pick_forward(x_TD: Array, there_S: Array, back_TK: Array) -> tuple[Array, tuple[Array, Array]]:
    return pick(x_TD, there_S, back_TK), (there_S, back_TK)


def _pick_backward(kept: tuple[Array, Array], dy_SD: Array) -> tuple[Array, None, None]:
    there_S, back_TK = kept
    return collect(dy_SD, back_TK, there_S), None, None


def _collect_forward(y_SD: Array, back_TK: Array, there_S: Array) -> tuple[Array, tuple[Array, Array]]:
    return collect(y_SD, back_TK, there_S), (there_S, back_TK)


def _collect_backward(kept: tuple[Array, Array], dx_TD: Array) -> tuple[Array, None, None]:
    there_S, back_TK = kept
    return pick(dx_TD, there_S, back_TK), None, None


pick.defvjp(_pick_forward, _pick_backward)
collect.defvjp(_collect_forward, _collect_backward)
