"""The engine's hands in JAX: a fixed set of compiled programs over rows that come and go.

What compiles depends on the model, the number of rows and slots, and a short list of widths. Everything that a request
may choose is an array.

    prefill   a chunk of one row's prompt, one program a width
    score     the same with log-probabilities of the chunk's tokens
    decode    every running row draws, up to BURST tokens a call
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
from jaxtyping import Array, Bool, Float, Int

from jaxlm.errors import UserError
from jaxlm.infer.engine import rows as row_ops
from jaxlm.infer.engine.request import MOST_LOGPROBS
from jaxlm.infer.engine.runner import BURST, Drawn, Orders, Scored
from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.models.decoder import Cache, Decoder, Params
from jaxlm.numerics import wide
from jaxlm.ops import sampling as ops
from jaxlm.ops.attention.slots import BLOCK

WIDTHS = (16, 64, 256)
"""Tokens of the pieces of a prompt."""


class State(NamedTuple):
    """What the device keeps between calls."""

    cache: Cache
    seen_RV: Bool[Array, "r v"]
    """Tokens of the prompt, for rows with a penalty."""
    counts_RV: Int[Array, "r v"]
    """How often a token stands in the text so far."""
    bias_RV: Float[Array, "r v"]
    """Added to the logits, -inf for forbidden ids."""


class JaxRunner:
    """Rows of a decoder on one device. Not for several threads at once; see `runner.Runner` for the contract.

    Args:
        slots: the longest text of a row; rounded up to whole blocks.
        widths: tokens of the prefill programs, rising; the last is the chunk.
    """

    def __init__(
        self, decoder: Decoder, params: Params, *, rows: int, slots: int, widths: Sequence[int] = WIDTHS
    ) -> None:
        self.original = decoder
        self._x64 = decoder.policy.compute == jnp.float64 or bool(jax.config.read("jax_enable_x64"))
        with self._numbers():
            self.decoder, self.params = unrolled_for_decoding(decoder, params)
        self.rows, self.widths, self.length = rows, tuple(widths), slots
        self.slots = rounded_slots(slots, self.widths[-1])
        self.vocab = decoder.config.vocab_size
        self.programs: dict[str, str] = {}
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        with self._numbers():
            self.state = _empty(self.decoder, self.rows, self.slots)

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
        for row in range(self.rows):
            self.reset(row)

    def _numbers(self) -> Any:
        return jax.enable_x64(self._x64)


def rounded_slots(slots: int, chunk: int) -> int:
    """Slots of a row for `slots` tokens: a chunk may be padded beyond the last token, and blocks are read whole."""
    return -(-(slots + chunk) // BLOCK) * BLOCK


def row_bytes(decoder: Decoder, slots: int, chunk: int = WIDTHS[-1]) -> int:
    """Memory of one row for `slots` tokens."""
    shapes = jax.eval_shape(lambda: _make_state(decoder, 1, rounded_slots(slots, chunk)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _make_state(decoder: Decoder, rows: int, slots: int) -> State:
    shape = (rows, decoder.config.vocab_size)
    counters = jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, wide(decoder.policy.compute))
    return State(row_ops.empty_rows(decoder, rows, slots), *counters)


_empty = jax.jit(_make_state, static_argnums=(0, 1, 2))


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
    return state, _log_probs(logits_CV, targets_1C[0])


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
        token_R, kept_RV = _draw(logits_RV, loop.state, orders, knobs, step)
        top_R = jnp.minimum(jnp.max(logits_RV, axis=-1), jnp.max(kept_RV, axis=-1))  # -inf where nothing may be drawn
        bad_R = active_R & ~jnp.isfinite(top_R)

        counts_RV = loop.state.counts_RV.at[jnp.arange(r), token_R].add(active_R.astype(jnp.int32))
        state = loop.state._replace(cache=cache, counts_RV=counts_RV)
        scored = _scored(logits_RV, kept_RV, token_R, orders)
        new = (token_R, bad_R, *scored)
        drawn = tuple(
            lax.dynamic_update_index_in_dim(all_NR, one_R, step, 0)
            for all_NR, one_R in zip(loop.drawn[:-1], new, strict=True)
        )
        ended_R = jnp.any(token_R[:, None] == orders.ends, axis=-1) | bad_R
        return _Loop(step + 1, active_R & ended_R, token_R, state, (*drawn, step + 1))

    def goes_on(loop: _Loop) -> Array:
        return (loop.step < orders.until) & ~jnp.any(loop.ended_R)

    width = wide(decoder.policy.compute)
    few, many = (BURST, r), (BURST, r, min(MOST_LOGPROBS, decoder.config.vocab_size))
    drawn = (
        jnp.zeros(few, jnp.int32),
        jnp.zeros(few, bool),
        jnp.zeros(few, width),
        jnp.zeros(many, jnp.int32),
        jnp.zeros(many, width),
        jnp.int32(0),
    )
    loop = _Loop(jnp.int32(0), jnp.zeros(r, bool), jnp.asarray(orders.token), state, drawn)
    loop = lax.while_loop(goes_on, body, loop)
    return loop.state, loop.drawn


def _draw(logits_RV: Array, state: State, orders: Orders, knobs: ops.Knobs, step: Array) -> tuple[Array, Array]:
    """The next token of each row, and the logits that the draw was from, those not kept at -inf."""
    seen_RV = lambda: state.seen_RV | (state.counts_RV > 0)  # noqa: E731
    logits_RV = ops.penalised_rows(logits_RV, seen_RV(), state.counts_RV, knobs)
    biased_R1 = (orders.biased != 0)[:, None]  # the others may still have the bias of a text before
    logits_RV = lax.cond(
        jnp.any(biased_R1), lambda x: jnp.where(biased_R1, x + state.bias_RV, x), lambda x: x, logits_RV
    )

    # Ends are forbidden until the text has its least length; then the grammar has its say.
    early_R1 = (orders.made + step < orders.least)[:, None]
    rows_R1 = jnp.arange(logits_RV.shape[0])[:, None]
    ends_RE = jnp.where(early_R1 & (orders.ends >= 0), orders.ends, logits_RV.shape[1])
    logits_RV = lax.cond(
        jnp.any(early_R1), lambda x: x.at[rows_R1, ends_RE].set(-jnp.inf, mode="drop"), lambda x: x, logits_RV
    )
    logits_RV = lax.cond(
        jnp.any(orders.ruled != 0),
        lambda x: jnp.where(_unpacked(orders, x.shape[1]), x, -jnp.inf),
        lambda x: x,
        logits_RV,
    )

    def sampled(logits_RV: Array) -> tuple[Array, Array]:
        kept_RV = ops.filtered_rows(logits_RV, knobs)
        return ops.draw(kept_RV, orders.uniforms[step]), kept_RV

    some = jnp.any((orders.active != 0) & ((knobs.temperature > 0) | (orders.processed != 0)))
    token_R, kept_RV = lax.cond(some, sampled, lambda x: (ops.greedy(x), x), logits_RV)
    forced_R = orders.forced[step]
    return jnp.where(forced_R >= 0, forced_R, token_R).astype(jnp.int32), kept_RV


def _scored(logits_RV: Array, kept_RV: Array, token_R: Array, orders: Orders) -> tuple[Array, ...]:
    """Log-probabilities of the drawn tokens and the likeliest, raw or of the distribution drawn from."""

    def score(_: None) -> tuple[Array, ...]:
        return _log_probs(jnp.where(orders.processed[:, None] != 0, kept_RV, logits_RV), token_R)

    def nothing(_: None) -> tuple[Array, ...]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(score, None))

    return lax.cond(jnp.any(orders.scored != 0), score, nothing, None)


def _log_probs(logits_RV: Array, token_R: Array) -> tuple[Array, ...]:
    """Log-probability of each token, and the likeliest tokens with theirs."""
    total_R = jax.nn.logsumexp(logits_RV, axis=-1)
    own_R = jnp.take_along_axis(logits_RV, token_R[:, None], axis=-1)[:, 0] - total_R
    top_RQ, ids_RQ = lax.top_k(logits_RV, min(MOST_LOGPROBS, logits_RV.shape[-1]))
    return own_R, ids_RQ.astype(jnp.int32), top_RQ - total_R[:, None]


def _unpacked(orders: Orders, vocab: int) -> Array:
    """Which tokens the grammar of each row allows; all in rows without one."""
    bits_RW32 = (orders.mask[:, :, None] >> jnp.arange(32)) & 1
    allowed_RV = bits_RW32.reshape(bits_RW32.shape[0], -1)[:, :vocab] != 0
    return allowed_RV | (orders.ruled == 0)[:, None]


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
