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

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import UserError
from jaxlm.infer.engine.on_jax import programs
from jaxlm.infer.engine.on_jax import rows as row_ops
from jaxlm.infer.engine.on_jax.joined import joined_for_decoding
from jaxlm.infer.engine.runner import BURST, Drawn, Orders, Scored
from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.ops.attention.slots import block_of
from jaxlm.processes import meet

WIDTHS = (16, 64, 256)
"""Tokens of the pieces of a prompt."""


class JaxRunner:
    """Rows of a decoder. Not for several threads at once; see `runner.Runner` for the contract.

    Args:
        slots: the longest text of a row; rounded up to whole blocks.
        widths: tokens of the prefill programs, rising; the last is the chunk.
        speculates: windows get room for tokens that are taken back, and `verify` is compiled.
        layout: devices over which parameters, kv heads and inner channels are split; None: all lie on the first. Every
            device has all rows, so `data` splits nothing.

    Raises:
        UserError: a mesh axis does not divide what it splits.
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
        layout: Layout | None = None,
    ) -> None:
        self.original = decoder
        self._x64 = decoder.policy.compute == jnp.float64 or bool(jax.config.read("jax_enable_x64"))
        with self._numbers():
            self._layout = None if layout is None else whole_rows(layout)
            self.decoder, self.params = self._laid(params)
            self._placed = programs.Placed(self.decoder, self._layout)
        self.rows, self.widths, self.length = rows, tuple(widths), slots
        self.slots = rounded_slots(slots, self.widths[-1])
        self.vocab, self.speculates = decoder.config.vocab_size, speculates
        self.shared = layout is not None and meet.several()
        self.programs: dict[str, str] = {}
        self.clear()

    def clear(self) -> None:
        """Empty all rows."""
        with self._numbers():
            self.state = programs.empty(self._placed, self.rows, self.slots, BURST if self.speculates else 0)
        self.has_states = row_ops.has_states(self.state.cache)

    def update(self, params: Params) -> None:
        """Take other parameters, as the decoder that was handed in has them; no program is compiled anew.

        Raises:
            UserError: a name or a shape differs.
        """
        with self._numbers():
            _, new = self._laid(params)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (new, self.params))
        if shapes[0] != shapes[1]:
            raise UserError("the new weights have other names, shapes or dtypes than those of the engine")
        self.params = new

    def prefill(self, row: int, tokens: Sequence[int] | np.ndarray, start: int, width: int) -> None:
        """Put a piece of a prompt into a row, at `start`: ids, or vectors [C, D] in place of their embeddings."""
        with self._numbers():
            chunk = programs.Chunk(row, _padded(tokens, width), start, len(tokens))
            self.state = programs.prefill(self._placed, self.params, self.state, chunk)

    def score(self, row: int, tokens: Sequence[int], targets: Sequence[int], start: int, width: int) -> Scored:
        """As `prefill`, with the log-probabilities of the tokens that follow."""
        with self._numbers():
            chunk = programs.Chunk(row, _padded(tokens, width), start, len(tokens))
            targets_1C = _padded(targets, width)
            self.state, scored = programs.score(self._placed, self.params, self.state, chunk, targets_1C)
            return Scored(*(np.asarray(x)[: len(tokens)] for x in scored))

    def decode(self, orders: Orders) -> Drawn:
        """Draw in every running row until `orders.until` tokens, or until a row ends."""
        with self._numbers():
            self.state, drawn = programs.decode(self._placed, self.params, self.state, orders)
            return Drawn(*(np.asarray(x) for x in drawn))

    def verify(self, orders: Orders, guess: np.ndarray, masks: np.ndarray) -> Drawn:
        """Draw in every running row while its guesses [N, R] are drawn, and one token more; -1: no guess.

        Args:
            masks: in place of `orders.mask`, one for each token [N, R, W].
        """
        with self._numbers():
            self.state, drawn = programs.verify(self._placed, self.params, self.state, orders, guess, masks)
            return Drawn(*(np.asarray(x) for x in drawn))

    def reset(self, row: int, *, scrub: bool = False) -> None:
        """Empty a row; `scrub` also overwrites numbers that are none."""
        with self._numbers():
            self.state = programs.reset(self._placed, self.state, row, int(scrub))

    def penalise(self, row: int, seen_V: np.ndarray, counts_V: np.ndarray, bias_V: np.ndarray) -> None:
        """Set what the penalties of a row count, and its bias."""
        with self._numbers():
            self.state = programs.set_row(self.state, row, seen_V, counts_V, bias_V)

    def keep(self, row: int, start: int) -> Any:
        """What the row has after the chunk at `start`, the last one written."""
        with self._numbers():
            return programs.keep(self._placed, self.state, row, start, self.widths[-1])

    def put_back(self, row: int, start: int, kept: Any) -> None:
        """Put what `keep` returned into a row."""
        with self._numbers():
            self.state = programs.put_back(self._placed, self.state, row, start, kept)

    def kept_bytes(self, kept: Any) -> int:
        """Memory of what `keep` returned."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(kept))

    def warm_up(self, *, draft: bool = False) -> None:
        """Compile every program by running it once, and list them; with `draft` those that a draft needs."""
        shape = f"rows {self.rows}, slots {self.slots}, vocabulary {self.vocab}"
        empty = Orders.empty(self.rows, self.vocab)
        for width in self.widths:
            self.prefill(0, [0] * width, 0, width)
            self.programs[f"prefill {width}"] = f"tokens [1, {width}]"
        self.decode(empty)
        self.programs |= dict.fromkeys(("decode", "reset"), shape)
        if self.has_states or not draft:
            self.put_back(0, 0, self.keep(0, 0))
            self.programs |= dict.fromkeys(("keep", "put_back"), f"chunk of {self.widths[-1]}")
        if not draft:
            self._warm_up_rest(empty, shape)
        for row in range(self.rows):
            self.reset(row)

    def _warm_up_rest(self, empty: Orders, shape: str) -> None:
        self.score(0, [0], [0], 0, self.widths[0])
        self.programs["score"] = f"tokens [1, {self.widths[0]}]"
        self.penalise(0, np.zeros(self.vocab, bool), np.zeros(self.vocab, np.int32), np.zeros(self.vocab, np.float32))
        self.programs["penalise"] = shape
        if self.speculates:
            guess, mask = np.full_like(empty.forced, -1), np.broadcast_to(empty.mask, (BURST, *empty.mask.shape))
            self.verify(empty, guess, mask)
            self.programs["verify"] = f"{shape}, guesses {BURST - 1}"

    def _laid(self, params: Params) -> tuple[Decoder, Params]:
        """The decoder that computes and its parameters: where the mesh wants them, on one device with joined maps."""
        if self._layout is None:
            return joined_for_decoding(self.original, params)
        decoder, params = unrolled_for_decoding(self.original, params)
        shapes, axes = abstract_params(decoder)
        return decoder, jax.device_put(params, self._layout.shardings(axes, shapes))

    def _numbers(self) -> Any:
        return jax.enable_x64(self._x64)


def whole_rows(layout: Layout) -> Layout:
    """The layout in which rows and their tokens are split over nothing: a prompt is one row, a step one token."""
    return dataclasses.replace(layout, rules={**layout.rules, "batch": (), "seq": ()})


def rounded_slots(slots: int, chunk: int) -> int:
    """Slots of a row for `slots` tokens: a chunk may be padded beyond the last token, and blocks are read whole."""
    block = block_of(slots + chunk)
    return -(-(slots + chunk) // block) * block


def row_bytes(decoder: Decoder, slots: int, chunk: int = WIDTHS[-1]) -> int:
    """Memory of one row for `slots` tokens."""
    shapes = jax.eval_shape(lambda: programs.make_state(programs.Placed(decoder), 1, rounded_slots(slots, chunk)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def _padded(tokens: Sequence[int] | np.ndarray, width: int) -> np.ndarray:
    """One row of ids, or of vectors, up to a width."""
    given = tokens if isinstance(tokens, np.ndarray) and tokens.ndim == 2 else np.asarray(tokens, np.int32)
    padded = np.zeros((1, width, *given.shape[1:]), given.dtype)
    padded[0, : len(given)] = given
    return padded
