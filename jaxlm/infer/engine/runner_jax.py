"""The engine's hands in JAX: a fixed set of compiled programs over rows that come and go.

What compiles depends on the model, the number of rows and slots, and a short list of widths. Everything that a request
may choose is an array.

    prefill   a chunk of one row's prompt, one program a width
    score     the same with log-probabilities of the chunk's tokens
    decode    every running row draws, up to BURST tokens a call
    verify    every running row draws as far as its guesses are right, in one look at all of them
    reset     empty a row; penalise: counts and bias of a row
    keep, put_back   a chunk and its states, out of a row and into one

Shapes: R rows, N tokens of a burst, C of a chunk, V vocabulary, E end ids, Q likeliest others, W words of a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxlm.errors import UserError
from jaxlm.infer.engine import rows as row_ops
from jaxlm.infer.engine.draw_jax import State, draw_rows, log_probs, score_rows
from jaxlm.infer.engine.request import MOST_LOGPROBS
from jaxlm.infer.engine.runner import BURST, Drawn, Orders, Scored
from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.models.decoder import Cache, Decoder, Params
from jaxlm.numerics import wide
from jaxlm.ops import sampling as ops
from jaxlm.ops.attention.slots import block_of

WIDTHS = (16, 64, 256)
"""Tokens of the pieces of a prompt."""


class JaxRunner:
    """Rows of a decoder on one device. Not for several threads at once; see `runner.Runner` for the contract.

    Args:
        slots: the longest text of a row; rounded up to whole blocks.
        widths: tokens of the prefill programs, rising; the last is the chunk.
        speculates: windows get room for tokens that are taken back, and `verify` is compiled.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: Params,
        *,
        rows: int,
        slots: int,
        widths: Sequence[int] = WIDTHS,
        speculates: bool = False,
    ) -> None:
        self.original = decoder
        self._x64 = decoder.policy.compute == jnp.float64 or bool(jax.config.read("jax_enable_x64"))
        with self._numbers():
            self.decoder, self.params = unrolled_for_decoding(decoder, params)
        self.rows, self.widths, self.length = rows, tuple(widths), slots
        self.slots = rounded_slots(slots, self.widths[-1])
        self.vocab, self.speculates = decoder.config.vocab_size, speculates
        self.programs: dict[str, str] = {}
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        with self._numbers():
            self.state = _empty(self.decoder, self.rows, self.slots, BURST if self.speculates else 0)

    def update(self, params: Params) -> None:
        """Take other parameters, as the decoder that was handed in has them; no program is compiled anew.

        Raises:
            UserError: a name or a shape differs.
        """
        with self._numbers():
            _, new = unrolled_for_decoding(self.original, params)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (new, self.params))
        if shapes[0] != shapes[1]:
            raise UserError("the new weights have other names, shapes or dtypes than those of the engine")
        self.params = new

    def prefill(self, row: int, tokens: Sequence[int], start: int, width: int) -> None:
        """Put a piece of a prompt into a row, at `start`."""
        with self._numbers():
            padded = _padded(tokens, width)
            self.state = _prefill(self.decoder, self.params, self.state, row, padded, start, len(tokens))

    def score(self, row: int, tokens: Sequence[int], targets: Sequence[int], start: int, width: int) -> Scored:
        """As `prefill`, with the log-probabilities of the tokens that follow."""
        with self._numbers():
            padded = _padded(tokens, width), _padded(targets, width)
            self.state, scored = _score(self.decoder, self.params, self.state, row, *padded, start, len(tokens))
            return Scored(*(np.asarray(x)[: len(tokens)] for x in scored))

    def decode(self, orders: Orders) -> Drawn:
        """Draw in every running row until `orders.until` tokens, or until a row ends."""
        with self._numbers():
            self.state, drawn = _decode(self.decoder, self.params, self.state, orders)
            return Drawn(*(np.asarray(x) for x in drawn))

    def verify(self, orders: Orders, guess: np.ndarray, masks: np.ndarray) -> Drawn:
        """Draw in every running row while its guesses [N, R] are drawn, and one token more; -1: no guess.

        Args:
            masks: in place of `orders.mask`, one for each token [N, R, W].
        """
        with self._numbers():
            self.state, drawn = _verify(self.decoder, self.params, self.state, orders, guess, masks)
            return Drawn(*(np.asarray(x) for x in drawn))

    def reset(self, row: int, *, scrub: bool = False) -> None:
        """Empty a row; `scrub` also overwrites numbers that are none."""
        with self._numbers():
            self.state = _reset(self.decoder, self.state, row, int(scrub))

    def penalise(self, row: int, seen_V: np.ndarray, counts_V: np.ndarray, bias_V: np.ndarray) -> None:
        """Set what the penalties of a row count, and its bias."""
        with self._numbers():
            self.state = _set_row(self.state, row, seen_V, counts_V, bias_V)

    def keep(self, row: int, start: int) -> Any:
        """What the row has after the chunk at `start`, the last one written."""
        with self._numbers():
            return _keep(self.decoder, self.state, row, start, self.widths[-1])

    def put_back(self, row: int, start: int, kept: Any) -> None:
        """Put what `keep` returned into a row."""
        with self._numbers():
            self.state = _put_back(self.decoder, self.state, row, start, kept)

    def kept_bytes(self, kept: Any) -> int:
        """Memory of what `keep` returned."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(kept))

    def warm_up(self) -> None:
        """Compile every program by running it once, and list them."""
        for width in self.widths:
            self.prefill(0, [0] * width, 0, width)
            self.programs[f"prefill {width}"] = f"tokens [1, {width}]"
        self.score(0, [0], [0], 0, self.widths[0])
        self.programs["score"] = f"tokens [1, {self.widths[0]}]"
        self.put_back(0, 0, self.keep(0, 0))
        self.programs |= dict.fromkeys(("keep", "put_back"), f"chunk of {self.widths[-1]}")
        self.penalise(0, np.zeros(self.vocab, bool), np.zeros(self.vocab, np.int32), np.zeros(self.vocab, np.float32))
        self.decode(Orders.empty(self.rows, self.vocab))
        shape = f"rows {self.rows}, slots {self.slots}, vocabulary {self.vocab}"
        self.programs |= dict.fromkeys(("penalise", "decode", "reset"), shape)
        if self.speculates:
            empty = Orders.empty(self.rows, self.vocab)
            guess, mask = np.full_like(empty.forced, -1), np.broadcast_to(empty.mask, (BURST, *empty.mask.shape))
            self.verify(empty, guess, mask)
            self.programs["verify"] = f"{shape}, guesses {BURST - 1}"
        for row in range(self.rows):
            self.reset(row)

    def _numbers(self) -> Any:
        return jax.enable_x64(self._x64)


def rounded_slots(slots: int, chunk: int) -> int:
    """Slots of a row for `slots` tokens: a chunk may be padded beyond the last token, and blocks are read whole."""
    block = block_of(slots + chunk)
    return -(-(slots + chunk) // block) * block


def row_bytes(decoder: Decoder, slots: int, chunk: int = WIDTHS[-1]) -> int:
    """Memory of one row for `slots` tokens."""
    shapes = jax.eval_shape(lambda: _make_state(decoder, 1, rounded_slots(slots, chunk)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _make_state(decoder: Decoder, rows: int, slots: int, room: int = 0) -> State:
    shape = (rows, decoder.config.vocab_size)
    counters = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, wide(decoder.policy.compute))
    return State(row_ops.empty_rows(decoder, rows, slots, room), *counters)


_empty = jax.jit(_make_state, static_argnums=(0, 1, 2, 3))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(
    decoder: Decoder,
    params: Params,
    state: State,
    row: Int[Array, ""],
    tokens_1C: Int[Array, "1 c"],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> State:
    return _run_chunk(decoder, params, state, row, tokens_1C, start, count)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score(
    decoder: Decoder,
    params: Params,
    state: State,
    row: Int[Array, ""],
    tokens_1C: Int[Array, "1 c"],
    targets_1C: Int[Array, "1 c"],
    start: Int[Array, ""],
    count: Int[Array, ""],
) -> tuple[State, tuple[Array, ...]]:
    state, hidden_1CD = _run_chunk(decoder, params, state, row, tokens_1C, start, count)
    logits_CV: Array = _unembed(decoder, params, hidden_1CD)[0]
    return state, log_probs(logits_CV, targets_1C[0])


def _run_chunk(
    decoder: Decoder, params: Params, state: State, row: Array, tokens_1C: Array, start: Array, count: Array
) -> tuple[State, Array]:
    """A chunk of one row, of which `count` tokens are real; the others lie behind them and change nothing."""
    index_1C = jnp.arange(tokens_1C.shape[1], dtype=jnp.int32)[None]
    real_1C = (index_1C < count).astype(jnp.int32)
    part = row_ops.one_row(decoder, state.cache, row)
    # Padding stands at the first real token's place where positions must lie within a table.
    positions_1C = jnp.where(real_1C != 0, start + index_1C, start).astype(jnp.int32)
    hidden_1CD, part = _hidden(decoder, params, tokens_1C, positions_1C, real_1C, part)
    return state._replace(cache=row_ops.put_row(decoder, state.cache, row, part)), hidden_1CD


class _Loop(NamedTuple):
    """What the decoding loop carries."""

    step: Int[Array, ""]
    ended_R: Bool[Array, " r"]
    token_R: Int[Array, " r"]
    state: State
    drawn: tuple[Array, ...]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(decoder: Decoder, params: Params, state: State, orders: Orders) -> tuple[State, tuple[Array, ...]]:
    """Each step feeds a row's last token, which no layer has seen yet, and draws the next."""
    r = orders.token.shape[0]
    knobs = ops.Knobs(*(jnp.asarray(values) for values in orders.knobs))
    active_R = orders.active != 0

    def body(loop: _Loop) -> _Loop:
        position_R1 = (orders.position + loop.step)[:, None]
        token_R1, active_R1 = loop.token_R[:, None], active_R.astype(jnp.int32)[:, None]
        cache, step = loop.state.cache, loop.step
        hidden_R1D, cache = _hidden(decoder, params, token_R1, position_R1, active_R1, cache)
        logits_RV = _unembed(decoder, params, hidden_R1D)[:, 0]
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

    drawn = _nothing_drawn(decoder, r)
    loop = _Loop(jnp.int32(0), jnp.zeros(r, bool), jnp.asarray(orders.token), state, drawn)
    loop = lax.while_loop(goes_on, body, loop)
    return loop.state, loop.drawn


def _nothing_drawn(decoder: Decoder, rows: int) -> tuple[Array, ...]:
    """The arrays of `Drawn`, without a token."""
    width, count = wide(decoder.policy.compute), min(MOST_LOGPROBS, decoder.config.vocab_size)
    few, many = (BURST, rows), (BURST, rows, count)
    counts = jnp.zeros(few, jnp.int32), jnp.zeros(few, bool), jnp.zeros(few, width)
    return (*counts, jnp.zeros(many, jnp.int32), jnp.zeros(many, width), jnp.zeros(rows, jnp.int32))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _verify(
    decoder: Decoder, params: Params, state: State, orders: Orders, guess_NR: Array, masks_NRW: Array
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
        return _hidden(decoder, params, tokens_RN, positions_RN.astype(jnp.int32), real_RN.astype(jnp.int32), cache)

    hidden_RND, after = feed(state.cache, guesses_R + 1)
    logits_RNV = _unembed(decoder, params, hidden_RND)

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
    loop = _Loop(jnp.int32(0), ~active_R, jnp.asarray(orders.token), begun, _nothing_drawn(decoder, r))
    loop = lax.while_loop(lambda loop: (loop.step < n) & ~jnp.all(loop.ended_R), body, loop)

    # Of slots by position, guesses that were wrong are overwritten. States are computed again, from before the call.
    taken_R, after = loop.drawn[-1], loop.state.cache
    if row_ops.has_states(after):
        right = jnp.all(~active_R | (taken_R == guesses_R + 1))
        again = lambda new: feed(row_ops.before_states(state.cache, new), taken_R)[1]  # noqa: E731
        after = lax.cond(right, lambda new: new, again, after)
    return loop.state._replace(cache=after), loop.drawn


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _reset(decoder: Decoder, state: State, row: Array, scrub: Array) -> State:
    return state._replace(cache=row_ops.reset_row(decoder, state.cache, jnp.int32(row), scrub))


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(state: State, row: Array, seen_V: Array, counts_V: Array, bias_V: Array) -> State:
    return state._replace(
        seen_RV=state.seen_RV.at[row].set(seen_V),
        counts_RV=state.counts_RV.at[row].set(counts_V),
        bias_RV=state.bias_RV.at[row].set(bias_V.astype(state.bias_RV.dtype)),
    )


@functools.partial(jax.jit, static_argnums=(0, 4))
def _keep(decoder: Decoder, state: State, row: Array, start: Array, size: int) -> row_ops.Kept:
    return row_ops.keep(decoder, state.cache, jnp.int32(row), jnp.int32(start), size)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _put_back(decoder: Decoder, state: State, row: Array, start: Array, kept: row_ops.Kept) -> State:
    cache = row_ops.put_back(decoder, state.cache, jnp.int32(row), jnp.int32(start), kept)
    return state._replace(cache=cache)


def _hidden(decoder: Decoder, params: Params, *inputs: Any) -> tuple[Array, Cache]:
    returned: Any = decoder.apply({"params": params}, *inputs, method="hidden")
    return returned


def _unembed(decoder: Decoder, params: Params, hidden_BTD: Array) -> Array:
    returned: Any = decoder.apply({"params": params}, hidden_BTD, method="unembed")
    return returned


def _padded(tokens: Sequence[int], width: int) -> np.ndarray:
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    return padded


__all__ = ["JaxRunner", "row_bytes"]
