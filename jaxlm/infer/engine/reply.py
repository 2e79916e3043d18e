"""What `Engine.submit` returns: parts as they arrive, for threads and for asyncio, and the whole at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
from collections.abc import AsyncIterator, Callable, Iterator

from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.request import LogProb, Part, Request, Result, Usage


class Reply:
    """The answer to a request, while it is made.

    Iterating gives parts of all choices as they arrive; `result` waits for the whole. With `best_of`, parts come when
    all choices have ended and the best are known.
    """

    def __init__(self, request: Request, growing: list[Growing], wake: Callable[[], None]) -> None:
        self.request, self.prompt_ids = request, growing[0].prompt_ids
        self.growing = growing
        self.prompt_log_probs: list[LogProb] = []
        self._parts: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._wake = wake
        self._pump: Callable[[], bool] | None = None
        self._over = False
        self._ranked: list[int] | None = None

    def cancel(self) -> None:
        """End all choices as they are, within one step of the engine."""
        for growing in self.growing:
            growing.cancelled = True
        self._wake()

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return all(growing.finish is not None for growing in self.growing)

    def result(self) -> Result:
        """Wait for the end; returns all choices."""
        for _ in self:
            pass
        kept = self._best()
        choices = tuple(dataclasses.replace(growing.choice(), index=i) for i, growing in enumerate(kept))
        usage = Usage(
            len(self.prompt_ids),
            sum(growing.reused for growing in self.growing),
            sum(len(growing.ids) for growing in self.growing),
            sum(growing.guessed.tokens for growing in self.growing),
            sum(growing.guessed.accepted for growing in self.growing),
            sum(growing.guessed.calls for growing in self.growing),
        )
        return Result(self.request, tuple(self.prompt_ids), choices, usage, tuple(self.prompt_log_probs))

    def __iter__(self) -> Iterator[Part]:
        while (part := self._next()) is not None:
            yield part

    async def __aiter__(self) -> AsyncIterator[Part]:
        while (part := await asyncio.to_thread(self._next)) is not None:
            yield part

    def pump_by(self, step: Callable[[], bool]) -> None:
        """Whoever waits makes the engine's steps: it has no thread of its own."""
        self._pump = step

    def deliver(self, growing: Growing) -> None:
        """Hand on what is new in a choice; called by the engine."""
        part = growing.part()
        if part is not None and self.request.best_of is None:
            self._parts.put(part)
        if not self._over and self.done:
            self._over = True
            if self.request.best_of is not None:
                for index, one in enumerate(self._best()):
                    whole = one.choice()
                    self._parts.put(Part(index, whole.text, whole.ids, whole.log_probs, whole.finish))
            self._parts.put(None)

    def _next(self) -> Part | None:
        while self._pump is not None and self._parts.empty() and not self._over:
            self._pump()
        part = self._parts.get()
        if part is None:
            self._parts.put(None)  # for whoever asks again
        return part

    def _best(self) -> list[Growing]:
        """The n choices to return; of `best_of`, those with the largest mean log-probability."""
        if self.request.best_of is None:
            return self.growing

        def mean(growing: Growing) -> float:
            values = [one.log_prob for one in growing.log_probs]
            return sum(values) / len(values) if values else float("-inf")

        ranked = sorted(self.growing, key=lambda growing: (-mean(growing), growing.index))
        return ranked[: self.request.n]
