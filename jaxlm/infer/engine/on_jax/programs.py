"""The engine's compiled programs: what depends on the model, the number of rows and slots, and a list of widths alone.

Everything that a request may choose is an array.

Shapes: R rows, N tokens of a burst, C of a chunk, V vocabulary, E end ids, Q likeliest others, W words of a mask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.infer.engine.on_jax import rows as row_ops
from jaxlm.infer.engine.on_jax.draw import State, draw_rows, log_probs, score_rows
from jaxlm.infer.engine.request import MOST_LOGPROBS
from jaxlm.infer.engine.runner import BURST, Orders
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Cache, Decoder, Params
from jaxlm.numerics import wide
from jaxlm.ops import sampling as ops


@dataclasses.dataclass(frozen=True)
class Placed:
    """A decoder, and the devices over which its parameters and the rows are split; None: they lie on one."""

    decoder: Decoder
    layout: Layout | None = dataclasses.field(default=None, hash=False)

    def active(self) -> contextlib.AbstractContextManager[None]:
        """While tracing inside, activations lie where the layout says."""
        return contextlib.nullcontext() if self.layout is None else self.layout.active()

    def held(self, state: State) -> State:
        """The state where it lies between calls: caches by kv heads, inner channels or heads, the rest whole."""
        if self.layout is None:
            return state
        places = self.layout.shardings(row_ops.row_axes(self.decoder, state.cache), state.cache)
        whole: Any = self.layout.replicated
        return jax.lax.with_sharding_constraint(state, State(places, whole, whole, whole))

    def read(self, found: tuple[Array, ...]) -> tuple[Array, ...]:
        """Outputs for the host, whole on every device: each process reads its own."""
        return found if self.layout is None else jax.lax.with_sharding_constraint(found, self.layout.replicated)


def make_state(placed: Placed, rows: int, slots: int, room: int = 0) -> State:
    """Returns the state of empty rows."""
    decoder = placed.decoder
    shape, width = (rows, decoder.config.vocab_size), wide(decoder.policy.compute)
    counters = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, width)
    return placed.held(State(row_ops.empty_rows(decoder, rows, slots, room), *counters))


empty = jax.jit(make_state, static_argnums=(0, 1, 2, 3))


class Chunk(NamedTuple):
    """A piece of a prompt for one row, of which `count` tokens are real; the others lie behind and change nothing."""

    row: Int[Array, ""] | int
    tokens_1C: Int[Array | np.ndarray, "1 c"] | Float[Array | np.ndarray, "1 c d"]
    """Ids, or vectors in place of their embeddings."""
    start: Int[Array, ""] | int
    count: Int[Array, ""] | int


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(placed: Placed, params: Params, state: State, chunk: Chunk) -> State:
    return _run_chunk(placed, params, state, chunk)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def score(
    placed: Placed, params: Params, state: State, chunk: Chunk, targets_1C: Int[Array, "1 c"]
) -> tuple[State, tuple[Array, ...]]:
    state, hidden_1CD = _run_chunk(placed, params, state, chunk)
    logits_CV: Array = _unembed(placed, params, hidden_1CD)[0]
    return state, placed.read(log_probs(logits_CV, targets_1C[0]))


def _run_chunk(placed: Placed, params: Params, state: State, chunk: Chunk) -> tuple[State, Array]:
    row, tokens_1C, start, count = map(jnp.asarray, chunk)
    index_1C = jnp.arange(tokens_1C.shape[1], dtype=jnp.int32)[None]
    real_1C = (index_1C < count).astype(jnp.int32)
    part = row_ops.one_row(placed.decoder, state.cache, row)
    # Padding stands at the first real token's place where positions must lie within a table.
    positions_1C = jnp.where(real_1C != 0, start + index_1C, start).astype(jnp.int32)
    hidden_1CD, part = _hidden(placed, params, tokens_1C, positions_1C, real_1C, part)
    cache = row_ops.put_row(placed.decoder, state.cache, row, part)
    return placed.held(state._replace(cache=cache)), hidden_1CD


class _Loop(NamedTuple):
    """What the decoding loop carries."""

    step: Int[Array, ""]
    ended_R: Bool[Array, " r"]
    token_R: Int[Array, " r"]
    state: State
    drawn: tuple[Array, ...]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(placed: Placed, params: Params, state: State, orders: Orders) -> tuple[State, tuple[Array, ...]]:
    """Each step feeds a row's last token, which no layer has seen yet, and draws the next."""
    r = orders.token.shape[0]
    knobs = ops.Knobs(*(jnp.asarray(values) for values in orders.knobs))
    active_R = orders.active != 0

    def body(loop: _Loop) -> _Loop:
        position_R1 = (orders.position + loop.step)[:, None]
        token_R1, active_R1 = loop.token_R[:, None], active_R.astype(jnp.int32)[:, None]
        cache, step = loop.state.cache, loop.step
        hidden_R1D, cache = _hidden(placed, params, token_R1, position_R1, active_R1, cache)
        logits_RV = _unembed(placed, params, hidden_R1D)[:, 0]
        token_R, kept_RV = draw_rows(logits_RV, loop.state, orders, knobs, step)
        top_R = jnp.minimum(jnp.max(logits_RV, axis=-1), jnp.max(kept_RV, axis=-1))  # -inf where nothing may be drawn
        bad_R = active_R & ~jnp.isfinite(top_R)

        counts_RV = loop.state.counts_RV.at[jnp.arange(r), token_R].add(active_R.astype(jnp.int32))
        state = loop.state._replace(cache=cache, counts_RV=counts_RV)
        scored = score_rows(logits_RV, kept_RV, token_R, orders)
        new = (token_R, bad_R, *scored)
        drawn = tuple(
            lax.dynamic_update_index_in_dim(all_NR, one_R, step, 0)
            for all_NR, one_R in zip(loop.drawn[:-1], new, strict=True)
        )
        ended_R = jnp.any(token_R[:, None] == orders.ends, axis=-1) | bad_R
        return _Loop(step + 1, active_R & ended_R, token_R, state, (*drawn, jnp.full(r, step + 1)))

    def goes_on(loop: _Loop) -> Array:
        return (loop.step < orders.until) & ~jnp.any(loop.ended_R)

    drawn = _nothing_drawn(placed, r)
    loop = _Loop(jnp.int32(0), jnp.zeros(r, bool), jnp.asarray(orders.token), state, drawn)
    loop = lax.while_loop(goes_on, body, loop)
    return placed.held(loop.state), placed.read(loop.drawn)


def _nothing_drawn(placed: Placed, rows: int) -> tuple[Array, ...]:
    """The arrays of `Drawn`, without a token."""
    width, count = wide(placed.decoder.policy.compute), min(MOST_LOGPROBS, placed.decoder.config.vocab_size)
    few, many = (BURST, rows), (BURST, rows, count)
    counts = jnp.zeros(few, jnp.int32), jnp.zeros(few, bool), jnp.zeros(few, width)
    return (*counts, jnp.zeros(many, jnp.int32), jnp.zeros(many, width), jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def verify(
    placed: Placed, params: Params, state: State, orders: Orders, guess_NR: Array, masks_NRW: Array
) -> tuple[State, tuple[Array, ...]]:
    """Feed each row its last token and its guesses at once, then draw from left to right while they are right."""
    n, r = guess_NR.shape
    knobs = ops.Knobs(*(jnp.asarray(values) for values in orders.knobs))
    active_R, index_1N = orders.active != 0, jnp.arange(n)[None]
    guesses_R = jnp.sum(jnp.cumprod(guess_NR >= 0, axis=0), axis=0)
    tokens_RN = jnp.concatenate([jnp.asarray(orders.token)[None], jnp.maximum(guess_NR[:-1], 0)]).T.astype(jnp.int32)

    def feed(cache: Cache, count_R: Array) -> tuple[Array, Cache]:
        real_RN = active_R[:, None] & (index_1N < count_R[:, None])
        positions_RN = orders.position[:, None] + jnp.where(real_RN, index_1N, 0)
        return _hidden(placed, params, tokens_RN, positions_RN.astype(jnp.int32), real_RN.astype(jnp.int32), cache)

    hidden_RND, after = feed(state.cache, guesses_R + 1)
    logits_RNV = _unembed(placed, params, hidden_RND)

    def body(loop: _Loop) -> _Loop:
        step, alive_R = loop.step, ~loop.ended_R
        logits_RV = lax.dynamic_index_in_dim(logits_RNV, step, 1, keepdims=False)
        masked = orders._replace(mask=lax.dynamic_index_in_dim(masks_NRW, step, 0, keepdims=False))
        token_R, kept_RV = draw_rows(logits_RV, loop.state, masked, knobs, step)
        top_R = jnp.minimum(jnp.max(logits_RV, axis=-1), jnp.max(kept_RV, axis=-1))
        bad_R = alive_R & ~jnp.isfinite(top_R)
        counts_RV = loop.state.counts_RV.at[jnp.arange(r), token_R].add(alive_R.astype(jnp.int32))
        new = (token_R, bad_R, *score_rows(logits_RV, kept_RV, token_R, orders))
        drawn = tuple(
            lax.dynamic_update_index_in_dim(all_NR, one_R, step, 0)
            for all_NR, one_R in zip(loop.drawn[:-1], new, strict=True)
        )
        over_R = jnp.any(token_R[:, None] == orders.ends, axis=-1) | bad_R | (token_R != guess_NR[step])
        counted = (*drawn, loop.drawn[-1] + alive_R.astype(jnp.int32))
        return _Loop(step + 1, loop.ended_R | over_R, token_R, loop.state._replace(counts_RV=counts_RV), counted)

    begun = state._replace(cache=after)
    loop = _Loop(jnp.int32(0), ~active_R, jnp.asarray(orders.token), begun, _nothing_drawn(placed, r))
    loop = lax.while_loop(lambda loop: (loop.step < n) & ~jnp.all(loop.ended_R), body, loop)

    # Of slots by position, guesses that were wrong are overwritten. States are computed again, from before the call.
    taken_R, after = loop.drawn[-1], loop.state.cache
    if row_ops.has_states(after):
        right = jnp.all(~active_R | (taken_R == guesses_R + 1))
        again = lambda new: feed(row_ops.before_states(state.cache, new), taken_R)[1]  # noqa: E731
        after = lax.cond(right, lambda new: new, again, after)
    return placed.held(loop.state._replace(cache=after)), placed.read(loop.drawn)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def reset(placed: Placed, state: State, row: Array, scrub: Array) -> State:
    return placed.held(state._replace(cache=row_ops.reset_row(placed.decoder, state.cache, jnp.int32(row), scrub)))


@functools.partial(jax.jit, donate_argnums=0)
def set_row(state: State, row: Array, seen_V: Array, counts_V: Array, bias_V: Array) -> State:
    return state._replace(
        seen_RV=state.seen_RV.at[row].set(seen_V),
        counts_RV=state.counts_RV.at[row].set(counts_V),
        bias_RV=state.bias_RV.at[row].set(bias_V.astype(state.bias_RV.dtype)),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def keep(placed: Placed, state: State, row: Array, start: Array, size: int) -> row_ops.Kept:
    return row_ops.keep(placed.decoder, state.cache, jnp.int32(row), jnp.int32(start), size)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def put_back(placed: Placed, state: State, row: Array, start: Array, kept: row_ops.Kept) -> State:
    cache = row_ops.put_back(placed.decoder, state.cache, jnp.int32(row), jnp.int32(start), kept)
    return placed.held(state._replace(cache=cache))


def _hidden(placed: Placed, params: Params, *inputs: Any) -> tuple[Array, Cache]:
    with placed.active():
        returned: Any = placed.decoder.apply({"params": params}, *inputs, method="hidden")
    return returned


def _unembed(placed: Placed, params: Params, hidden_BTD: Array) -> Array:
    with placed.active():
        returned: Any = placed.decoder.apply({"params": params}, hidden_BTD, method="unembed")
    return returned
