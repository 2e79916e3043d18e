"""Tokens to the devices of their experts and back, along a mesh axis, inside `jax.shard_map`.

Each device holds some of the tokens and some of the experts. `gather` sends every token to every device. `all_to_all`
sends a device only the rows that its own experts compute: in a first round room for 1.25 times the mean from each
device to each other one, and, as often as the fullest pair of devices needs it, further rounds of a quarter of the
mean. So shapes are static, memory is bounded, and nothing is dropped however uneven the router is.
(`jax.lax.ragged_all_to_all` would send the exact counts into a buffer for the worst case, P times the mean; XLA has it
for GPUs and TPUs alone.)

Shapes: T tokens of this device, D width, E experts, K experts of one token, P devices along the axis, C rows that one
device sends another in a round, S = P C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import typed_jax
from jaxlm.ops.moe.dispatch import Plan, collect, pick, sort_by_expert, take
from jaxlm.typed_jax import Axis, all_gather, custom_vjp, fori_loop, pmax, psum_scatter, tree_map, vjp

SLACK = 1.25
"""Rows of the first round, over the mean."""
FURTHER = 0.25
"""Rows of each further round, over the mean."""
FURTHER_ROUNDS = "further_rounds"
"""Scope of the loop over them in a compiled program: it does not turn while the experts are balanced."""

_State = TypeVar("_State")
Compute = Callable[[Array, Array, Array, Any], Array]
"""`(rows [S, D], weights [S, K], this device's experts [S, K], parameters) -> [S, D]`; as many as it has: none."""


def gather(
    compute: Compute,
    x_TD: Float[Array, "t d"],
    weights_TK: Float[Array, "t k"],
    experts_TK: Int[Array, "t k"],
    parameters: Any,
    *,
    n_local: int,
    axis: Axis,
) -> Float[Array, "t d"]:
    """All tokens to all devices, and the sum of what each of them adds. Arguments: `all_to_all`."""
    x, weights, experts = (all_gather(a, axis, tiled=True) for a in (x_TD, weights_TK, experts_TK))
    # Numbers of this device's own experts, counted from 0. All others become n_local, which `compute` takes as "no
    # expert" and answers with zeros; so the sum over devices adds each expert exactly once.
    own = experts - jax.lax.axis_index(axis) * n_local
    y = compute(x, weights, jnp.where((own >= 0) & (own < n_local), own, n_local), parameters)
    return psum_scatter(y, axis)


def all_to_all(
    compute: Compute,
    x_TD: Float[Array, "t d"],
    weights_TK: Float[Array, "t k"],
    experts_TK: Int[Array, "t k"],
    parameters: Any,
    *,
    n_local: int,
    axis: Axis,
    together: tuple[str, ...],
) -> Float[Array, "t d"]:
    """What the experts of all devices along `axis` add to each token of this one.

    Args:
        compute: what this device does with rows for its own experts.
        experts_TK: of all experts, by device; E or more: none.
        parameters: of this device's experts.
        n_local: experts of a device.
        together: the axes of the mesh, all devices of which make equally many rounds, so that their collectives meet.
    """
    devices = jax.lax.axis_size(axis)
    plan = sort_by_expert(experts_TK, devices * n_local)
    # Experts are numbered device by device, so rows sorted by expert are sorted by device too: those for device p end
    # where the rows of its last expert end.
    ends_P = plan.ends[n_local - 1 :: n_local]
    counts_P = jnp.diff(ends_P, prepend=0)
    first, further = sizes(*experts_TK.shape, devices=devices, n_local=n_local)
    # Every device must enter every collective equally often, or the program hangs. So the number of rounds is that of
    # the fullest pair of devices anywhere; -((first - most) // further) is the quotient rounded up.
    most = pmax(jnp.max(counts_P), together)
    rounds = jnp.maximum(0, -((first - most) // further))
    send = _Send(compute, axis, n_local, first, further)
    return _rounds(send, x_TD, weights_TK, parameters, (plan, experts_TK, ends_P - counts_P, counts_P, rounds))


def sizes(tokens: int, top_k: int, *, devices: int, n_local: int) -> tuple[int, int]:
    """Rows C of the first round and of each further one: multiples of 8, and no more than can be needed."""
    # A token chooses each expert at most once, so one device never receives more than min(K, n_local) rows of a token.
    mean, most = tokens * top_k / devices, tokens * min(top_k, n_local)
    first, further = (int(-(-part * mean // 8)) * 8 for part in (SLACK, FURTHER))
    return min(first, most), min(further, most)


class _Send(NamedTuple):
    """What a round does, apart from the arrays."""

    compute: Compute
    axis: Axis
    n_local: int
    first: int
    further: int


Where = tuple[Plan, Array, Array, Array, Array]
"""The plan, the experts [T, K], first row and number of the rows for each device [P], and how many further rounds."""
Round = Callable[[Array, Array, Any], Array]
"""`(x [T, D], weights [T, K], parameters) -> [T, D]`: what the rows of one round add to the tokens."""
Kept = tuple[Callable[[Array], Any], Array, Array, Any, Where]
"""The gradient of the first round, and what the further ones are computed from again."""


def _round(send: _Send, begin: Any, places: int, where: Where, x_TD: Array, weights_TK: Array, own: Any) -> Array:
    """What the rows `begin` to `begin + places` for each device add to the tokens, wide."""
    plan, experts_TK, starts_P, counts_P, _ = where
    (n_tokens, top_k), n_slots = experts_TK.shape, len(starts_P) * places
    # there: which assignment lies in each place of what is sent. back: where each assignment lies.
    # A block of C places belongs to each device. The places behind its count are read from some row, so that the shape
    # is static, and are masked below.
    place_C = begin + jnp.arange(places, dtype=starts_P.dtype)
    filled_S = (place_C < counts_P[:, None]).reshape(-1)
    row_S = jnp.minimum(starts_P[:, None] + place_C, plan.order.size - 1).reshape(-1)
    there_S = take(plan.order, row_S)
    # The same map seen from the assignment: which device it goes to, and which place it has there in this round.
    # Assignments of other rounds, and those that are not carried out, get the place behind the last.
    device_TK = jnp.minimum(experts_TK // send.n_local, len(starts_P) - 1)
    place_TK = plan.rows - take(starts_P, device_TK) - begin
    present_TK = (place_TK >= 0) & (place_TK < places) & (experts_TK < len(starts_P) * send.n_local)
    back_TK = jnp.where(present_TK, device_TK * places + place_TK, n_slots)

    # With one split and one joined axis, the exchange is its own inverse: the second call brings each result back to
    # the place where its row was taken from.
    exchange = functools.partial(typed_jax.all_to_all, axis_name=send.axis)
    token_S = jnp.where(filled_S, there_S // top_k, n_tokens)
    assignment_S = jnp.where(filled_S, there_S, n_tokens * top_k)
    expert_S = jnp.where(filled_S, take(experts_TK.reshape(-1), there_S) % send.n_local, send.n_local)
    x_SD = exchange(pick(x_TD, token_S, back_TK))
    weights_S = exchange(pick(weights_TK.reshape(-1, 1), assignment_S, back_TK.reshape(-1, 1))[:, 0])
    # The weights travel with their rows and are applied where the expert is, so that what comes back is only added up.
    y_SD = send.compute(x_SD, weights_S[:, None], exchange(expert_S)[:, None], own)
    return collect(exchange(y_SD).astype(weights_TK.dtype), back_TK, token_S)


# The first round is differentiated as it stands, and keeps what its gradient needs. The further ones, which are rare
# and whose number is not known in advance, are computed again in the backward pass.


def _further(send: _Send, where: Where, start: _State, body: Callable[[Round, _State], _State]) -> _State:
    """`state = body(round, state)` for each further round."""

    def run(i: Array, state: _State) -> _State:
        return body(functools.partial(_round, send, send.first + i * send.further, send.further, where), state)

    with jax.named_scope(FURTHER_ROUNDS):
        return fori_loop(0, where[-1], run, start)


@custom_vjp(0)
def _rounds(send: _Send, x_TD: Array, weights_TK: Array, parameters: Any, where: Where) -> Array:
    y_TD = _round(send, 0, send.first, where, x_TD, weights_TK, parameters)
    return _finish(send, y_TD, x_TD, weights_TK, parameters, where)


def _finish(send: _Send, y_TD: Array, x_TD: Array, weights_TK: Array, parameters: Any, where: Where) -> Array:
    y_TD = _further(send, where, y_TD, lambda one, y: y + one(x_TD, weights_TK, parameters))
    return y_TD.astype(x_TD.dtype)


def _rounds_forward(send: _Send, x_TD: Array, weights_TK: Array, parameters: Any, where: Where) -> tuple[Array, Kept]:
    run = functools.partial(_round, send, 0, send.first, where)
    y_TD, pull = vjp(run, x_TD, weights_TK, parameters)
    return _finish(send, y_TD, x_TD, weights_TK, parameters, where), (pull, x_TD, weights_TK, parameters, where)


def _rounds_backward(send: _Send, kept: Kept, dy_TD: Array) -> tuple[Array, Array, Any, None]:
    pull, x_TD, weights_TK, parameters, where = kept
    # A round returns its part wide, before the sum is rounded to the dtype of x, so the cotangent of each round must be
    # wide too.
    dy_TD = dy_TD.astype(weights_TK.dtype)

    def add(one: Round, gradients: Any) -> Any:
        return tree_map(jnp.add, gradients, vjp(one, x_TD, weights_TK, parameters)[1](dy_TD))

    return *_further(send, where, pull(dy_TD), add), None


_rounds.defvjp(_rounds_forward, _rounds_backward)
