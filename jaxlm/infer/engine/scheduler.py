"""Who has a row, who takes a piece of its prompt next, who waits: pure bookkeeping, no framework and no text.

Waiting texts go in the order of their tickets. A tenant's texts have tickets one place apart, counted from where the
queue is, so tenants take turns; a step of priority is worth `HEAD_START` places. Later texts have later tickets, so
nobody waits for ever.

A prompt is cut into pieces by its length alone, so that a text is computed in the same pieces whoever sits beside it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jaxlm.errors import UserError

HEAD_START = 64
"""Places in the queue for each step of priority."""


class Piece(NamedTuple):
    """Some tokens of a prompt, for one call of a program of `width`."""

    key: int
    row: int
    start: int
    count: int
    width: int


class Plan(NamedTuple):
    """What happens in a step: pieces of prompts in this order, then these rows draw, all that have their prompts."""

    pieces: tuple[Piece, ...]
    draws: tuple[tuple[int, int], ...]
    """Keys and rows."""


@dataclasses.dataclass
class _Work:
    """A text: where it stands."""

    key: int
    length: int
    """Tokens to be put into the row before the first draw."""
    ticket: int
    after: int | None
    done: int = 0
    row: int | None = None


class Scheduler:
    """Rows and a bounded queue of texts, by keys that the caller chooses.

    Args:
        widths: of the pieces, rising.
        budget: tokens of prompts a step, at least one piece; where no text draws, so many for each row.
        most_waiting: texts in the queue.
    """

    def __init__(self, rows: int, widths: tuple[int, ...], *, budget: int = 0, most_waiting: int = 4096) -> None:
        if rows < 1:
            raise UserError(f"rows = {rows} must be positive")
        self.widths, self.budget, self.most_waiting = widths, budget or widths[-1], most_waiting
        self._free = list(range(rows))[::-1]
        self._waiting: dict[int, _Work] = {}
        self._running: dict[int, _Work] = {}  # in the order of admission
        self._tickets: dict[str, int] = {}
        self._now = 0

    def add(self, key: int, length: int, *, priority: int = 0, tenant: str = "", after: int | None = None) -> None:
        """Put a text into the queue.

        Args:
            length: tokens to put into its row before the first draw, 0 or more.
            after: a text whose prompt is the same; this one waits until that has its prompt in its row, or has gone.

        Raises:
            UserError: the queue is full.
        """
        assert key not in self._waiting and key not in self._running
        if len(self._waiting) >= self.most_waiting:
            raise UserError(f"the queue is full: {self.most_waiting} texts wait", "try again later")
        place = max(self._now, self._tickets.get(tenant, self._now)) + 1
        self._tickets[tenant] = place
        self._waiting[key] = _Work(key, length, place - HEAD_START * priority, after)

    def remove(self, key: int) -> int | None:
        """Forget a text; returns the row that it leaves, if it had one."""
        self._waiting.pop(key, None)
        work = self._running.pop(key, None)
        if work is None or work.row is None:
            return None
        self._free.append(work.row)
        return work.row

    def admit(self) -> tuple[int, int] | None:
        """Give a free row to the next text in the queue; returns its key and row, or None."""
        ready = [work for work in self._waiting.values() if not self._held_back(work)]
        if not self._free or not ready:
            return None
        work = min(ready, key=lambda work: (work.ticket, work.key))
        self._now = max(self._now, work.ticket)
        if not len(self._waiting) - 1:
            self._tickets.clear()
        work.row = self._free.pop()
        self._running[work.key] = self._waiting.pop(work.key)
        return work.key, work.row

    def skip(self, key: int, tokens: int) -> None:
        """So many tokens of the prompt are in the row already."""
        assert self._running[key].done == 0 and tokens <= self._running[key].length
        self._running[key].done = tokens

    def plan(self) -> Plan:
        """What happens now; it counts as done."""
        # The budget bounds the wait of texts that draw; where none does, texts that came together begin together.
        drawing = any(work.done == work.length for work in self._running.values())
        pieces, left = [], self.budget if drawing else self.budget * len(self._running)
        for work in self._running.values():
            while work.done < work.length and (left > 0 or not pieces):
                count, width = next_piece(work.length - work.done, self.widths)
                if pieces and count > left:
                    left = 0
                    break
                pieces.append(Piece(work.key, self._row(work), work.done, count, width))
                work.done += count
                left -= count
        draws = [(work.key, self._row(work)) for work in self._running.values() if work.done == work.length]
        return Plan(tuple(pieces), tuple(draws))

    @property
    def waiting(self) -> tuple[int, ...]:
        """Keys in the queue."""
        return tuple(self._waiting)

    @property
    def running(self) -> dict[int, int]:
        """Keys with their rows."""
        return {key: self._row(work) for key, work in self._running.items()}

    def has_prompt(self, key: int) -> bool:
        """Whether a text has its whole prompt in its row."""
        work = self._running.get(key)
        return work is not None and work.done == work.length

    def _held_back(self, work: _Work) -> bool:
        first = work.after
        return first is not None and (first in self._waiting or (first in self._running and not self.has_prompt(first)))

    @staticmethod
    def _row(work: _Work) -> int:
        assert work.row is not None
        return work.row


def next_piece(remaining: int, widths: tuple[int, ...]) -> tuple[int, int]:
    """Tokens of the next piece and the width of its program: the largest that is filled to more than a half."""
    for lower, width in zip((0, *widths), widths, strict=False):
        if remaining <= width:
            if remaining > width // 2 or not lower:
                return remaining, width
            return lower, lower
    return widths[-1], widths[-1]
