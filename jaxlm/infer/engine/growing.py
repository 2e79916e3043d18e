"""A choice while it grows: ids, text and log-probabilities, why it ends, and the random numbers of its next tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlm.infer.engine.request import Choice, Finish, LogProb, Part, Request
from jaxlm.infer.engine.structured import Guide
from jaxlm.text.completion import Guessed, StopStrings
from jaxlm.text.tokenizer import TextStream, Tokenizer

DRAWN_AHEAD = 256
"""Random numbers made at once."""


class Growing:
    """One choice of a request under way.

    Args:
        limit: tokens that the text may have.
        full: why a text of that length ends, `length` or `context`.
        ends: ids that end it.
        guide: what it must look like.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        prompt_ids: Sequence[int],
        *,
        limit: int,
        full: Finish,
        ends: Sequence[int],
        tokenizer: Tokenizer | None,
        guide: Guide | None = None,
    ) -> None:
        self.request, self.index, self.prompt_ids = request, index, prompt_ids
        self.limit, self.ends = limit, frozenset(ends)
        self.ids: list[int] = []
        self.text = ""
        self.log_probs: list[LogProb] = []
        self.finish: Finish | None = None
        self.ended_by: str | int | None = None
        self.cancelled = False
        self.guide = guide
        self.reused = 0
        self.guessed = Guessed()
        self._full: Finish = full
        self._stream = TextStream(tokenizer, skip_special=True, after=prompt_ids) if tokenizer else None
        self._stop = StopStrings(request.stop)
        self._generator = np.random.default_rng([request.seed, request.sample + index])
        self._uniforms = np.zeros(0, np.float32)
        self._shown = (0, 0)

    @property
    def last(self) -> int:
        """The newest token, of the prompt if there is no other."""
        return self.ids[-1] if self.ids else self.prompt_ids[-1]

    def uniforms(self, count: int) -> np.ndarray:
        """Numbers in [0, 1) for the next tokens.

        The k-th token draws with the k-th float32 of numpy's `default_rng([seed, sample + index])`, guessed or not.
        """
        at = len(self.ids)
        while len(self._uniforms) < at + count:
            more = self._generator.random(DRAWN_AHEAD, np.float32)
            self._uniforms = np.concatenate([self._uniforms, more])
        return self._uniforms[at : at + count]

    def count_guesses(self, guessed: int, right: int) -> None:
        """So many tokens were guessed in one call, and so many of them drawn."""
        calls, tokens, accepted = self.guessed
        self.guessed = Guessed(calls + 1, tokens + guessed, accepted + right)

    def push(self, token: int, log_prob: LogProb | None = None) -> None:
        """Take the next token; sets `finish` when it is the last."""
        self.ids.append(token)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if self.guide is not None:
            self.guide.push(token)
        if token in self.ends:
            self.end("stop", token)
            return
        if self._stream is not None:
            self.text += self._stop.push(self._stream.push(token))
            if self._stop.found:
                self.finish, self.ended_by = "stop", self._stop.string
                return
        if self.guide is not None and self.guide.over:
            self.end("stop", "grammar")
        elif len(self.ids) >= self.limit:
            self.end(self._full)

    def end(self, finish: Finish, by: str | int | None = None) -> None:
        """The text ends here; what was held back belongs to it."""
        self.finish, self.ended_by = finish, by
        if self._stream is not None:
            self.text += self._stop.push(self._stream.flush())
            if self._stop.found and finish not in ("error", "stop"):
                self.finish, self.ended_by = "stop", self._stop.string
            self.text += self._stop.flush()

    def part(self) -> Part | None:
        """What is new since the last call."""
        text, ids = self._shown
        self._shown = len(self.text), len(self.ids)
        if self._shown == (text, ids) and self.finish is None:
            return None
        log_probs = tuple(self.log_probs[ids:]) if self.request.logprobs is not None else ()
        return Part(self.index, self.text[text:], tuple(self.ids[ids:]), log_probs, self.finish)

    def choice(self) -> Choice:
        """The whole, when it has ended."""
        assert self.finish is not None
        ids, log_probs = tuple(self.ids), tuple(self.log_probs) if self.request.logprobs is not None else ()
        return Choice(self.index, self.text, ids, self.finish, self.ended_by, log_probs, self.guessed)
