"""The steps of an engine: what becomes of texts between the queue and their ends.

A step gives free rows to waiting texts, puts pieces of prompts into rows, and lets every row with a whole prompt draw.
One thread at a time; `Engine` sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.orders import RowOrders
from jaxlm.infer.engine.prefix import PrefixTable
from jaxlm.infer.engine.reply import Reply
from jaxlm.infer.engine.request import Finish
from jaxlm.infer.engine.runner import BURST, Runner
from jaxlm.infer.engine.scheduler import Piece, Scheduler
from jaxlm.infer.engine.speculative import Speculation


class Steps:
    """Texts by their keys, the rows that some of them have, and what the runner does with these."""

    def __init__(self, runner: Runner, prefixes: PrefixTable, scheduler: Scheduler, speculation: Speculation) -> None:
        self._runner, self._prefixes, self._scheduler = runner, prefixes, scheduler
        self._orders, self._speculation = RowOrders(runner.rows, runner.vocab), speculation
        self.texts: dict[int, tuple[Reply, Growing]] = {}
        """Of all keys that have not ended, in a row or waiting for one."""
        self._leaders: dict[int, int] = {}  # of a choice, the one whose prompt it shares
        self._shared: dict[int, list[Any]] = {}  # what leaders' rows had after each chunk, while others need it
        self._deadlines: dict[int, float] = {}

    @property
    def running(self) -> list[int]:
        """Keys of the texts that have a row."""
        return [*self._scheduler.running]

    @property
    def waiting(self) -> int:
        """Texts that wait for a row."""
        return len(self._scheduler.waiting)

    def add(self, key: int, reply: Reply, growing: Growing, leader: int | None) -> None:
        """Let a text wait for a row; `leader` is the choice of the same request whose prompt it shares."""
        request = growing.request
        self.texts[key] = reply, growing
        if leader is not None:
            self._leaders[key] = leader
        if request.deadline is not None:
            self._deadlines[key] = time.monotonic() + request.deadline
        length = len(growing.prompt_ids) - 1
        self._scheduler.add(key, length, priority=request.priority, tenant=request.tenant, after=leader)

    def forget(self) -> None:
        """Empty what outlives a text: known prefixes, rows, what was guessed from."""
        self._prefixes.clear()
        self._runner.clear()
        self._speculation.clear()

    def make(self) -> bool:
        """Make one step; returns whether there was anything to do."""
        now = time.monotonic()
        for key, (_, growing) in [*self.texts.items()]:
            if growing.cancelled:
                self.end(key, "cancelled")
            elif self._deadlines.get(key, now) < now:
                self.end(key, "deadline")
        while (admitted := self._scheduler.admit()) is not None:
            self._start(*admitted)
        plan = self._scheduler.plan()
        for piece in plan.pieces:
            self._put(piece)
        if plan.draws:
            self._draw(plan.draws, 1 if plan.pieces else BURST)
        return bool(plan.pieces or plan.draws)

    def _start(self, key: int, row: int) -> None:
        """Make a row ready: empty, with what is known of the prompt, and with the request's options."""
        _, growing = self.texts[key]
        self._runner.reset(row)
        ids, chunk = growing.prompt_ids[:-1], self._prefixes.chunk
        known = self._shared.get(self._leaders.get(key, -1))
        if known is not None:
            tokens = len(ids)
        else:
            known = [] if growing.request.echo else self._prefixes.find(self._names(growing))
            tokens = len(known) * chunk
        for i, kept in enumerate(known):
            self._runner.put_back(row, i * chunk, kept)
        if tokens:
            self._scheduler.skip(key, tokens)
            growing.reused = tokens
        if key not in self._leaders and growing.request.choices > 1:
            self._shared[key] = list(known)
        self._orders.start(row, growing, self._runner)

    def _names(self, growing: Growing) -> list[bytes]:
        return self._prefixes.names(growing.prompt_ids[:-1], growing.request.tenant)

    def _put(self, piece: Piece) -> None:
        """Compute a piece of a prompt, and keep what the row then has where another may want it."""
        reply, growing = self.texts[piece.key]
        chunk, ids = self._prefixes.chunk, growing.prompt_ids
        end = piece.start + piece.count
        tokens = ids[piece.start : end]
        if growing.request.echo and growing.index == 0:
            scored = self._runner.score(piece.row, tokens, ids[piece.start + 1 : end + 1], piece.start, piece.width)
            reply.prompt_log_probs += scored.listed(ids[piece.start + 1 : end + 1], growing.request.logprobs)
        else:
            self._runner.prefill(piece.row, tokens, piece.start, piece.width)
        shared, last = self._shared.get(piece.key), end == len(ids) - 1
        whole = end % chunk == 0
        wanted = whole and self._prefixes.memory > 0 and not growing.request.echo
        if not (wanted or (shared is not None and (whole or last))):
            return
        kept = self._runner.keep(piece.row, (end - 1) // chunk * chunk)
        if shared is not None:
            shared.append(kept)
        if wanted:
            self._prefixes.put(self._names(growing)[end // chunk - 1], kept, self._runner.kept_bytes(kept))

    def _draw(self, draws: Sequence[tuple[int, int]], burst: int) -> None:
        """Let rows draw, and hand on what they drew."""
        draws = [(key, row) for key, row in draws if self._ruled(key, row)]
        if not draws:
            return
        growing = {row: self.texts[key][1] for key, row in draws}
        keyed = {row: (key, self.texts[key][1]) for key, row in draws}
        guesses = self._speculation.guess(keyed, self._orders.make)
        if guesses:
            drawn = self._runner.verify(*self._orders.check(growing, guesses))
        else:
            # A mask is of one token.
            orders, steps = self._orders.make(growing, 1 if any(one.guide for one in growing.values()) else burst)
            drawn = self._runner.decode(orders._replace(until=np.asarray(steps, np.int32)))
        for key, row in draws:
            reply, one = self.texts[key]
            steps = int(drawn.steps[row])
            if guessed := guesses.get(row):
                one.count_guesses(len(guessed), steps - 1)
                self._speculation.learn(key, len(guessed), steps - 1)
            for step in range(steps):
                if drawn.bad[step, row]:
                    one.end("error", "no token can be drawn: the logits are not finite, or all are forbidden")
                elif one.finish is None:
                    token = int(drawn.tokens[step, row])
                    one.push(token, drawn.log_prob(step, row, one.request))
            self._orders.moved(row, one)
            if one.finish is not None:
                self.end(key, one.finish, scrub=one.finish == "error")
            else:
                reply.deliver(one)

    def _ruled(self, key: int, row: int) -> bool:
        """Tell the row what its grammar allows; a grammar that cannot be followed ends its text alone."""
        _, growing = self.texts[key]
        if growing.guide is not None and (why := self._orders.rule(row, growing.guide)):
            self.end(key, "error", why=why)
            return False
        return True

    def end(self, key: int, finish: Finish, *, scrub: bool = False, why: str = "") -> None:
        """Free the row of a text and end its choice, unless it has ended by itself."""
        reply, growing = self.texts.pop(key)
        row = self._scheduler.remove(key)
        if row is not None:
            self._orders.rest(row)
            if scrub:
                self._runner.reset(row, scrub=True)
        if growing.finish is None:
            growing.end(finish, why or None)
        self._deadlines.pop(key, None)
        self._speculation.forget(key)
        leader = self._leaders.pop(key, key)
        if leader not in self._leaders.values() and leader not in self.texts:
            self._shared.pop(leader, None)
        reply.deliver(growing)
