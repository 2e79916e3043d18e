"""One engine: many requests at once on a fixed number of rows, each with the tokens that it would have got alone.

    with Engine(runner, tokenizer, ends=(0,)) as engine:
        reply = engine.submit(Request("def add(a, b):", max_new_tokens=64))
        for part in reply: ...

`intake` looks at a request, `steps` puts its prompt into a row and lets the row draw, `scheduler` says who is next,
`prefix` what is known already, the runner computes. Here are the queue, the thread and what happens when a step fails.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
from collections.abc import Sequence
from typing import Any

from jaxlm.errors import UserError
from jaxlm.infer.engine.draft import Draft
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.intake import Intake
from jaxlm.infer.engine.prefix import PrefixTable
from jaxlm.infer.engine.reply import Reply
from jaxlm.infer.engine.request import Request
from jaxlm.infer.engine.runner import Runner
from jaxlm.infer.engine.scheduler import Scheduler
from jaxlm.infer.engine.speculative import Speculation
from jaxlm.infer.engine.steps import Steps
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
        threaded: steps run in a thread of the engine; otherwise whoever waits for a reply makes them. Processes
            that hold a model together submit the same requests in the same order, without threads.
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
        self.runner, self.intake = runner, Intake(runner, tokenizer, ends)
        self.prefixes = PrefixTable(runner.widths[-1], prefix_memory, fingerprint)
        self._draft, self._most_waiting = draft, most_waiting
        scheduler = Scheduler(runner.rows, runner.widths, budget=budget, most_waiting=most_waiting)
        speculation = Speculation(speculate, None if draft is None else Draft(draft, runner))
        self._steps = Steps(runner, self.prefixes, scheduler, speculation)
        if speculate and not runner.speculates:
            raise UserError("this runner has no room for speculation", "make it with speculates=True")
        if threaded and runner.shared:
            raise UserError("several processes hold this model and make the same steps", "engine(threaded=False)")
        self._inbox: collections.deque[tuple[int, Reply, Growing, int | None]] = collections.deque()
        self._keys = itertools.count()
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
        return len(self._steps.running)

    def submit(self, request: Request) -> Reply:
        """Put a request into the queue.

        Raises:
            UserError: the prompt is empty, too long or has ids that the model does not know; the queue is full; or the
                engine is closed.
        """
        if self._closed:
            raise UserError(self._closed)
        waiting = len(self._inbox) + self._steps.waiting
        if waiting + request.choices > self._most_waiting:
            raise UserError(f"the queue is full: {waiting} texts wait", "try again later")
        growing = self.intake.choices(request)
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
                self._take_inbox()
                busy = self._steps.make()
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
            if self._steps.texts or self._inbox:
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
            for key in [*self._steps.texts]:
                self._steps.end(key, "cancelled")

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
                    self._work.wait_for(lambda: self._closed or self._inbox or self._steps.texts, timeout=1)

    def _take_inbox(self) -> None:
        while self._inbox:
            self._steps.add(*self._inbox.popleft())

    def _fail(self, error: Exception) -> None:
        """End the texts in the rows with one line; the second failure in a row ends the engine."""
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _log.exception("a step of the engine failed")
        self._failures += 1
        for key in self._steps.running if self._failures < 2 else [*self._steps.texts]:
            self._steps.end(key, "error", why=why)
        if self._failures >= 2:
            self._closed = f"the engine has ended: {why}"
            return
        self._steps.forget()
