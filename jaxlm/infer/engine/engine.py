"""One engine: many requests at once on a fixed number of rows, each with the tokens that it would have got alone.

    with Engine(runner, tokenizer, ends=(0,)) as engine:
        reply = engine.submit(Request("def add(a, b):", max_new_tokens=64))
        for part in reply: ...

A step gives free rows to waiting texts, puts pieces of prompts into rows, and lets every row with a whole prompt draw.
All else is bookkeeping: `scheduler` says who is next, `prefix` what is known already, the runner computes.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.infer.engine.draft import Draft
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.orders import RowOrders
from jaxlm.infer.engine.prefix import PrefixTable
from jaxlm.infer.engine.reply import Reply
from jaxlm.infer.engine.request import ENDS, Finish, LogProb, Request
from jaxlm.infer.engine.runner import BURST, Drawn, Runner, Scored
from jaxlm.infer.engine.scheduler import Piece, Scheduler
from jaxlm.infer.engine.speculative import Speculation
from jaxlm.infer.engine.structured import Grammars
from jaxlm.text.completion import encode_prompts
from jaxlm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Engine:
    """Takes requests from any thread and answers each by a `Reply`.

    Args:
        ends: ids that end a text.
        prefix_memory: bytes that known beginnings of prompts may take; 0: none is kept.
        budget: tokens of prompts a step; 0: one chunk.
        most_waiting: texts in the queue.
        speculate: tokens that are guessed and checked in one call, up to 7; 0: none.
        draft: rows of a smaller model that makes the guesses; None: what followed the newest tokens before is guessed.
        threaded: steps run in a thread of the engine; otherwise whoever waits for a reply makes them.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        *,
        ends: Sequence[int] = (),
        prefix_memory: int = 0,
        fingerprint: str = "",
        budget: int = 0,
        most_waiting: int = 4096,
        speculate: int = 0,
        draft: Runner | None = None,
        threaded: bool = True,
        warm_up: bool = True,
    ) -> None:
        self.runner, self.tokenizer, self.ends = runner, tokenizer, tuple(dict.fromkeys(ends))[: ENDS // 2]
        self.prefixes = PrefixTable(runner.widths[-1], prefix_memory, fingerprint)
        self._scheduler = Scheduler(runner.rows, runner.widths, budget=budget, most_waiting=most_waiting)
        self._orders = RowOrders(runner.rows, runner.vocab)
        self._draft = draft
        self._speculation = Speculation(speculate, None if draft is None else Draft(draft, runner))
        if speculate and not runner.speculates:
            raise UserError("this runner has no room for speculation", "make it with speculates=True")
        self._texts: dict[int, tuple[Reply, Growing]] = {}
        self._leaders: dict[int, int] = {}  # of a choice, the one whose prompt it shares
        self._shared: dict[int, list[Any]] = {}  # what leaders' rows had after each chunk, while others need it
        self._deadlines: dict[int, float] = {}
        self._inbox: collections.deque[tuple[int, Reply, Growing, int | None]] = collections.deque()
        self._keys = itertools.count()
        self._grammars: Grammars | None = None
        self._work, self._lock = threading.Condition(), threading.RLock()
        self._closed, self._failures = "", 0
        self._thread: threading.Thread | None = None
        self._threaded = threaded
        if warm_up:
            runner.warm_up()
        if warm_up and draft is not None:
            draft.warm_up(draft=True)

    @property
    def programs(self) -> dict[str, str]:
        """The compiled programs, with their shapes."""
        drafts = {} if self._draft is None else self._draft.programs
        return self.runner.programs | {f"draft: {name}": shapes for name, shapes in drafts.items()}

    @property
    def in_use(self) -> int:
        """Rows that have a text."""
        return len(self._scheduler.running)

    def submit(self, request: Request) -> Reply:
        """Put a request into the queue.

        Raises:
            UserError: the prompt is empty, too long or has ids that the model does not know; the queue is full; or the
                engine is closed.
        """
        if self._closed:
            raise UserError(self._closed)
        ids = self._prompt_ids(request)
        waiting = len(self._inbox) + len(self._scheduler.waiting)
        if waiting + request.choices > self._scheduler.most_waiting:
            raise UserError(f"the queue is full: {waiting} texts wait", "try again later")
        growing = [self._growing(request, index, ids) for index in range(request.choices)]
        reply = Reply(request, growing, self._notify)
        if not self._threaded:
            reply.pump_by(self.step)
        leader: int | None = None
        for one in growing:
            key = next(self._keys)
            self._inbox.append((key, reply, one, leader))
            leader = key if leader is None else leader
        self._notify()
        return reply

    def step(self) -> bool:
        """Make one step; returns whether there was anything to do. An exception ends the texts in the rows."""
        with self._lock:
            try:
                busy = self._step()
                self._failures = 0
                return busy
            except Exception as error:  # the one boundary: a step that fails must not take the others' replies along
                self._fail(error)
                return True

    def update(self, params: Any) -> None:
        """Take other weights of the same shapes. No program is compiled anew; known prefixes are forgotten.

        Raises:
            UserError: requests are under way, or a shape differs.
        """
        with self._lock:
            if self._texts or self._inbox:
                raise UserError("the weights cannot change while requests are under way", "wait for their replies")
            self.runner.update(params)
            self.prefixes.clear()

    def close(self) -> None:
        """End all replies and the thread."""
        self._closed = self._closed or "the engine is closed"
        self._notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._take_inbox()
            for key in [*self._texts]:
                self._end(key, "cancelled")

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._work:
            if self._threaded and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="jaxlm engine", daemon=True)
                self._thread.start()
            self._work.notify_all()

    def _run(self) -> None:
        while not self._closed:
            if not self.step():
                with self._work:
                    self._work.wait_for(lambda: self._closed or self._inbox or self._texts, timeout=1)

    def _prompt_ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            if self.tokenizer is None:
                raise UserError("the engine has no tokenizer", "give the prompt as ids")
            (ids,) = encode_prompts(self.tokenizer, [request.prompt])
        else:
            ids = list(request.prompt)
        vocab, room = self.runner.vocab, self.runner.length
        if not ids:
            raise UserError("the prompt has no token", "begin with the end-of-text token")
        for what, some in (("the prompt", ids), ("forced", request.forced), ("forbidden", request.forbidden)):
            if some and not 0 <= min(some) <= max(some) < vocab:
                raise UserError(f"{what} has ids from {min(some)} to {max(some)}, the model knows 0 to {vocab - 1}")
        if any(not 0 <= token < vocab for token in (*request.logit_bias, *request.stop_ids)):
            raise UserError(f"logit_bias or stop_ids has an id that is not between 0 and {vocab - 1}")
        if len(ids) >= room:
            raise UserError(f"the prompt has {len(ids)} tokens, a row has room for {room} with the text")
        return ids

    def _growing(self, request: Request, index: int, ids: list[int]) -> Growing:
        ends = (*(() if request.ignore_eos else self.ends), *request.stop_ids)
        guide = None if request.grammar is None else self._grammar_rules().follow(request.grammar)
        room, wanted = self.runner.length - len(ids), request.max_new_tokens
        full: Finish = "context" if wanted is None or wanted > room else "length"
        limit = room if wanted is None else min(wanted, room)
        tokenizer = self.tokenizer
        return Growing(request, index, ids, limit=limit, full=full, ends=ends, tokenizer=tokenizer, guide=guide)

    def _grammar_rules(self) -> Grammars:
        if self._grammars is None:
            if self.tokenizer is None:
                raise UserError("a grammar needs a tokenizer", "the engine has none")
            self._grammars = Grammars(self.tokenizer, self.runner.vocab, self.ends)
        return self._grammars

    def _step(self) -> bool:
        self._take_inbox()
        now = time.monotonic()
        for key, (_, growing) in [*self._texts.items()]:
            if growing.cancelled:
                self._end(key, "cancelled")
            elif self._deadlines.get(key, now) < now:
                self._end(key, "deadline")
        while (admitted := self._scheduler.admit()) is not None:
            self._start(*admitted)
        plan = self._scheduler.plan()
        for piece in plan.pieces:
            self._put(piece)
        if plan.draws:
            self._draw(plan.draws, 1 if plan.pieces else BURST)
        return bool(plan.pieces or plan.draws)

    def _take_inbox(self) -> None:
        while self._inbox:
            key, reply, growing, leader = self._inbox.popleft()
            request = growing.request
            self._texts[key] = reply, growing
            if leader is not None:
                self._leaders[key] = leader
            if request.deadline is not None:
                self._deadlines[key] = time.monotonic() + request.deadline
            length = len(growing.prompt_ids) - 1
            self._scheduler.add(key, length, priority=request.priority, tenant=request.tenant, after=leader)

    def _start(self, key: int, row: int) -> None:
        """Make a row ready: empty, with what is known of the prompt, and with the request's options."""
        _, growing = self._texts[key]
        self.runner.reset(row)
        ids, chunk = growing.prompt_ids[:-1], self.prefixes.chunk
        known = self._shared.get(self._leaders.get(key, -1))
        if known is not None:
            tokens = len(ids)
        else:
            known = [] if growing.request.echo else self.prefixes.find(self._names(growing))
            tokens = len(known) * chunk
        for i, kept in enumerate(known):
            self.runner.put_back(row, i * chunk, kept)
        if tokens:
            self._scheduler.skip(key, tokens)
            growing.reused = tokens
        if key not in self._leaders and growing.request.choices > 1:
            self._shared[key] = list(known)
        self._orders.start(row, growing, self.runner)

    def _names(self, growing: Growing) -> list[bytes]:
        return self.prefixes.names(growing.prompt_ids[:-1], growing.request.tenant)

    def _put(self, piece: Piece) -> None:
        """Compute a piece of a prompt, and keep what the row then has where another may want it."""
        reply, growing = self._texts[piece.key]
        chunk, ids = self.prefixes.chunk, growing.prompt_ids
        end = piece.start + piece.count
        tokens = ids[piece.start : end]
        if growing.request.echo and growing.index == 0:
            scored = self.runner.score(piece.row, tokens, ids[piece.start + 1 : end + 1], piece.start, piece.width)
            reply.prompt_log_probs += _listed(scored, ids[piece.start + 1 : end + 1], growing.request.logprobs)
        else:
            self.runner.prefill(piece.row, tokens, piece.start, piece.width)
        shared, last = self._shared.get(piece.key), end == len(ids) - 1
        whole = end % chunk == 0
        wanted = whole and self.prefixes.memory > 0 and not growing.request.echo
        if not (wanted or (shared is not None and (whole or last))):
            return
        kept = self.runner.keep(piece.row, (end - 1) // chunk * chunk)
        if shared is not None:
            shared.append(kept)
        if wanted:
            self.prefixes.put(self._names(growing)[end // chunk - 1], kept, self.runner.kept_bytes(kept))

    def _draw(self, draws: Sequence[tuple[int, int]], burst: int) -> None:
        """Let rows draw, and hand on what they drew."""
        draws = [(key, row) for key, row in draws if self._ruled(key, row)]
        if not draws:
            return
        growing = {row: self._texts[key][1] for key, row in draws}
        keyed = {row: (key, self._texts[key][1]) for key, row in draws}
        guesses = self._speculation.guess(keyed, self._orders.make)
        if guesses:
            drawn = self.runner.verify(*self._orders.check(growing, guesses))
        else:
            # A mask is of one token.
            orders, steps = self._orders.make(growing, 1 if any(one.guide for one in growing.values()) else burst)
            drawn = self.runner.decode(orders._replace(until=np.asarray(steps, np.int32)))
        for key, row in draws:
            reply, one = self._texts[key]
            steps = int(drawn.steps[row])
            if guessed := guesses.get(row):
                one.count_guesses(len(guessed), steps - 1)
                self._speculation.learn(key, len(guessed), steps - 1)
            for step in range(steps):
                if drawn.bad[step, row]:
                    one.end("error", "no token can be drawn: the logits are not finite, or all are forbidden")
                elif one.finish is None:
                    token = int(drawn.tokens[step, row])
                    one.push(token, _log_prob(drawn, step, row, one.request))
            self._orders.moved(row, one)
            if one.finish is not None:
                self._end(key, one.finish, scrub=one.finish == "error")
            else:
                reply.deliver(one)

    def _ruled(self, key: int, row: int) -> bool:
        """Tell the row what its grammar allows; a grammar that cannot be followed ends its text alone."""
        _, growing = self._texts[key]
        if growing.guide is not None and (why := self._orders.rule(row, growing.guide)):
            self._end(key, "error", why=why)
            return False
        return True

    def _end(self, key: int, finish: Finish, *, scrub: bool = False, why: str = "") -> None:
        """Free the row of a text and end its choice, unless it has ended by itself."""
        reply, growing = self._texts.pop(key)
        row = self._scheduler.remove(key)
        if row is not None:
            self._orders.rest(row)
            if scrub:
                self.runner.reset(row, scrub=True)
        if growing.finish is None:
            growing.end(finish, why or None)
        self._deadlines.pop(key, None)
        self._speculation.forget(key)
        leader = self._leaders.pop(key, key)
        if leader not in self._leaders.values() and leader not in self._texts:
            self._shared.pop(leader, None)
        reply.deliver(growing)

    def _fail(self, error: Exception) -> None:
        """End the texts in the rows with one line; the second failure in a row ends the engine."""
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _log.exception("a step of the engine failed")
        self._failures += 1
        for key in [*self._scheduler.running] if self._failures < 2 else [*self._texts]:
            self._end(key, "error", why=why)
        if self._failures >= 2:
            self._closed = f"the engine has ended: {why}"
            return
        self.prefixes.clear()
        self.runner.clear()
        self._speculation.clear()


def _log_prob(drawn: Drawn, step: int, row: int, request: Request) -> LogProb | None:
    if request.logprobs is None and request.best_of is None:
        return None
    count = request.logprobs or 0
    ids, values = drawn.top_ids[step, row, :count], drawn.top_log_probs[step, row, :count]
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return LogProb(int(drawn.tokens[step, row]), float(drawn.log_probs[step, row]), top)


def _listed(scored: Scored, targets: Sequence[int], logprobs: int | None) -> list[LogProb]:
    count = logprobs or 0
    tops = zip(scored.top_ids[:, :count].tolist(), scored.top_log_probs[:, :count].tolist(), strict=True)
    return [
        LogProb(target, float(value), tuple(zip(ids, values, strict=True)))
        for target, value, (ids, values) in zip(targets, scored.log_probs.tolist(), tops, strict=True)
    ]
