"""What an engine asks of a framework: the contract of a runner, and the arrays that pass between them.

Shapes: R rows, N tokens of a burst, V vocabulary, E end ids, Q likeliest others, W words of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxlm.infer.engine.request import ENDS, LogProb, Request

BURST = 8
"""N: tokens that rows draw in one call when nothing else waits; a cancelled row is free after at most so many."""


class Orders(NamedTuple):
    """What the rows do in one call of `decode`. A row that is not active rests, and keeps what it has."""

    token: np.ndarray
    """Last token of each row, which the model has not seen yet [R]."""
    position: np.ndarray
    """Its position [R]."""
    active: np.ndarray
    """1 where a row draws [R]."""
    made: np.ndarray
    """Tokens of the text so far [R]."""
    least: np.ndarray
    """Tokens before which no end may be drawn [R]."""
    biased: np.ndarray
    """1 where the bias counts [R]."""
    scored: np.ndarray
    """1 where log-probabilities are wanted [R]."""
    processed: np.ndarray
    """1 where they are those of the distribution that is drawn from [R]."""
    ruled: np.ndarray
    """1 where the mask counts [R]."""
    ends: np.ndarray
    """Ids that end a row, -1 for none [R, E]."""
    forced: np.ndarray
    """Tokens that are taken whatever is drawn, -1 for none [N, R]."""
    uniforms: np.ndarray
    """Random numbers in [0, 1) [N, R]."""
    mask: np.ndarray
    """Bits of the tokens that a grammar allows [R, W]."""
    knobs: tuple[np.ndarray, ...]
    """In the order of `ops.sampling.Knobs`, [R] each."""
    until: np.ndarray
    """Tokens to draw at most, up to N."""

    @classmethod
    def empty(cls, rows: int, vocab: int) -> Orders:
        """All rows rest."""
        numbers = (np.zeros(rows, np.int32) for _ in range(9))
        knobs = (np.zeros(rows), np.zeros(rows, np.int32), np.ones(rows), np.ones(rows), np.zeros(rows))
        penalties = np.ones(rows), np.zeros(rows), np.zeros(rows)
        return cls(
            *numbers,
            ends=np.full((rows, ENDS), -1, np.int32),
            forced=np.full((BURST, rows), -1, np.int32),
            uniforms=np.zeros((BURST, rows), np.float32),
            mask=np.full((rows, -(-vocab // 32)), -1, np.int32),
            knobs=(*knobs, *penalties),
            until=np.asarray(1, np.int32),
        )


class Drawn(NamedTuple):
    """What `decode` and `verify` return; of each row the first `steps` of N are real."""

    tokens: np.ndarray
    """[N, R]."""
    bad: np.ndarray
    """Where the logits held numbers that are none [N, R]."""
    log_probs: np.ndarray
    """Of the tokens [N, R]; zero where not wanted."""
    top_ids: np.ndarray
    """The likeliest tokens, falling [N, R, Q]."""
    top_log_probs: np.ndarray
    steps: np.ndarray
    """Tokens of each row that are real [R]."""

    def log_prob(self, step: int, row: int, request: Request) -> LogProb | None:
        """Of one token, with the likeliest in its place, as the request wants it."""
        if request.logprobs is None and request.best_of is None:
            return None
        count = request.logprobs or 0
        ids, values = self.top_ids[step, row, :count], self.top_log_probs[step, row, :count]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return LogProb(int(self.tokens[step, row]), float(self.log_probs[step, row]), top)


class Scored(NamedTuple):
    """Log-probabilities of the tokens that follow those of a piece."""

    log_probs: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray

    def listed(self, targets: Sequence[int], logprobs: int | None) -> list[LogProb]:
        """Of each target, with so many of the likeliest in its place."""
        count = logprobs or 0
        tops = zip(self.top_ids[:, :count].tolist(), self.top_log_probs[:, :count].tolist(), strict=True)
        return [
            LogProb(target, float(value), tuple(zip(ids, values, strict=True)))
            for target, value, (ids, values) in zip(targets, self.log_probs.tolist(), tops, strict=True)
        ]


@runtime_checkable
class Runner(Protocol):
    """Rows of a model: see `on_jax.runner.JaxRunner` for what each call does. One thread at a time."""

    rows: int
    length: int
    """Tokens that a row has room for."""
    speculates: bool
    """Whether `verify` may be called: windows need room for it."""
    has_states: bool
    """Whether a layer has a state, which cannot be cut back."""
    shared: bool
    """Whether several processes hold the model together, and make the same calls in the same order."""
    vocab: int
    widths: tuple[int, ...]
    """Of the pieces of a prompt, rising; the last is the chunk that `keep` keeps."""
    programs: dict[str, str]

    def clear(self) -> None: ...
    def update(self, params: Any) -> None: ...
    def prefill(self, row: int, tokens: Sequence[int] | np.ndarray, start: int, width: int) -> None: ...
    def score(self, row: int, tokens: Sequence[int], targets: Sequence[int], start: int, width: int) -> Scored: ...
    def decode(self, orders: Orders) -> Drawn: ...
    def verify(self, orders: Orders, guess: np.ndarray, masks: np.ndarray) -> Drawn: ...
    def reset(self, row: int, *, scrub: bool = False) -> None: ...
    def penalise(self, row: int, seen_V: np.ndarray, counts_V: np.ndarray, bias_V: np.ndarray) -> None: ...
    def keep(self, row: int, start: int) -> Any: ...
    def put_back(self, row: int, start: int, kept: Any) -> None: ...
    def kept_bytes(self, kept: Any) -> int: ...
    def warm_up(self, *, draft: bool = False) -> None: ...
