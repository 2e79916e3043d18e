"""Monty: an interpreter of Python, written in Rust, that has no operating system to misuse (`pydantic-monty`, MIT).

It needs no feature of the kernel, so it works where nothing else isolates. It lacks parts of the language and most of
the library: right answers fail, so every score is a lower bound and says so. Program and tests run in two workers, and
what crosses between them is plain data, as in `inside.wire`. Time is that of the clock while a worker runs: of a
program, its loading and all its calls together.
"""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import importlib.util
import threading
import time
from typing import Any

from jaxlm.sandbox.backends import Backend, Launch, Request
from jaxlm.sandbox.inside import wire
from jaxlm.sandbox.verdicts import HarnessError, Limits, Ran, Tests, Verdict

NAME = "monty"
PROXY = """
def {name}(*words, **named):
    return ask_the_program({name!r}, list(words), named)
"""
LIMITED = {"TimeoutError": "cpu_time", "MemoryError": "memory"}
MOST_WORKERS = 256
"""Two for each program that is judged at a time; further ones wait until both are free."""
_PAIRS = threading.BoundedSemaphore(MOST_WORKERS // 2)
"""Without it each of many judgements could hold one worker and wait for its second for ever."""


_MAKING = threading.Lock()
"""Held while the pool is made: threads that ask at once share one."""


@functools.cache
def _pool() -> Any:
    import pydantic_monty

    pool = pydantic_monty.Monty(min_processes=2, max_processes=MOST_WORKERS)
    pool.__enter__()
    atexit.register(pool.__exit__, None, None, None)
    return pool


def _session(limits: Limits) -> Any:
    allowed = {"max_feed_duration_secs": limits.cpu_seconds, "max_memory": limits.memory, "max_suspensions": 1_000_000}
    with _MAKING:
        pool = _pool()
    return pool.checkout(
        limits={**allowed, "max_total_sleep_secs": limits.idle_seconds},
        os_policy={"random_start": {"seed": 0}, "sleep_system_max": limits.idle_seconds},
        assert_message_annotations=False,
    )


class _Ended(Exception):
    """The verdict is known."""

    def __init__(self, kind: str, text: str = "", **details: object) -> None:
        super().__init__(kind)
        self.verdict = Verdict(kind, text, details, NAME)


def _cause(error: Any) -> tuple[str, BaseException | None]:
    """Name how a feed failed: the kind of verdict, and the exception of the program."""
    import pydantic_monty

    if isinstance(error, pydantic_monty.MontySyntaxError):
        return "syntax", error.exception()
    if isinstance(error, pydantic_monty.MontyRuntimeError):
        inner = error.exception()
        return LIMITED.get(type(inner).__name__, "exception"), inner
    if isinstance(error, pydantic_monty.MontyCrashedError):
        return ("cpu_time" if error.timed_out else "crashed"), None
    return "not_plain", None


class _Program:
    """A loaded program, called by the tests."""

    def __init__(self, session: Any, limits: Limits, cancel: threading.Event | None, printed: Any) -> None:
        self.session, self.limits, self.cancel, self.printed = session, limits, cancel, printed
        self.calls = 0
        self.seconds = 0.0  # of the loading and of all calls
        self.ended: _Ended | None = None
        self.raised: BaseException | None = None
        self.last = ""

    def feed(self, source: str, **inputs: object) -> object:
        """Run source in the program's worker. More time in all than allowed ends the program. Raises: MontyError."""
        began = time.monotonic()
        try:
            return self.session.feed_run(source, inputs=inputs, print_callback=self.printed)
        finally:
            self.seconds += time.monotonic() - began
            if self.seconds > self.limits.cpu_seconds:
                self.ended = self.ended or _Ended("cpu_time", f"more than {self.limits.cpu_seconds:g} s in all")

    def ask(self, name: str, words: list, named: dict) -> object:
        """Call a function of the program. Returns plain data. Raises: the program's exception."""
        import pydantic_monty

        if self.cancel and self.cancel.is_set():
            self.ended = _Ended("crashed", "cancelled")
        if self.ended:
            raise self.ended
        self.calls += 1
        self.last = f"{name}({', '.join(map(repr, words))})"[:600]
        try:
            value = self.feed(f"{name}(*words_of_call, **named_of_call)", words_of_call=words, named_of_call=named)
            return wire.decode(wire.encode(value), in_order=True)
        except (wire.NotPlain, wire.BadMessage) as error:
            self.ended = _Ended("not_plain", str(error)[:300], call=self.last)
        except pydantic_monty.MontyError as error:
            kind, inner = _cause(error)
            if isinstance(inner, NameError) and f"'{name}'" in str(inner):
                kind = "no_function"
            if kind != "exception" or inner is None:
                self.ended = _Ended(kind, str(error)[:300], call=self.last)
            else:
                self.raised = inner
                raise inner from None
        raise self.ended


def judge(program: str, tests: Tests, limits: Limits, cancel: threading.Event | None) -> Verdict:
    """Run tests against a program, each in a worker of its own."""
    import pydantic_monty

    with _PAIRS, _session(limits) as answer, _session(limits) as judge_side:
        link = _Program(answer, limits, cancel, pydantic_monty.CollectString(limits.output))
        try:
            link.feed(program)
        except pydantic_monty.MontyError as error:
            kind, _ = _cause(error)
            return Verdict(kind, str(error)[:300], {}, NAME)
        proxies = "".join(PROXY.format(name=name) for name in tests.names)
        source = f"{tests.prelude}\n{proxies}\ncandidate = {tests.names[0]}\n{tests.source}"
        silent = pydantic_monty.CollectString(limits.output)
        try:
            judge_side.feed_run(source, external_lookup={"ask_the_program": link.ask}, print_callback=silent)
        except pydantic_monty.MontyError as error:
            return _failed(link, error)
    if link.ended:
        return link.ended.verdict
    if link.calls == 0:
        raise HarnessError("the tests never called the program")
    return Verdict("passed", "", {}, NAME, round(link.seconds, 2))


def _failed(link: _Program, error: Any) -> Verdict:
    if link.ended:
        return link.ended.verdict
    kind, inner = _cause(error)
    if link.raised is not None and (type(inner), str(inner)) == (type(link.raised), str(link.raised)):
        return Verdict("exception", str(inner)[:300], {"call": link.last, "type": type(inner).__name__}, NAME)
    if isinstance(inner, AssertionError):
        return Verdict("failed", str(inner)[:300], {"call": link.last}, NAME)
    return Verdict(kind if kind in LIMITED.values() else "exception", f"in the tests: {error}"[:300], {}, NAME)


def run(program: str, stdin: bytes, limits: Limits, cancel: threading.Event | None) -> Ran:
    """Run a whole program. It has no standard input."""
    import pydantic_monty

    del stdin, cancel
    printed = pydantic_monty.CollectStreams(limits.output)
    kind, text, status = "finished", "left with status 0", 0
    with _session(limits) as session:
        try:
            session.feed_run(program, print_callback=printed)
        except pydantic_monty.MontyError as error:
            kind, _ = _cause(error)
            kind, text, status = ("finished" if kind in ("exception", "syntax") else kind), str(error), 1
    out, err = ("".join(part for stream, part in printed.output if stream == name) for name in ("stdout", "stderr"))
    err += f"{text}\n" if status else ""
    return Ran(kind, status, out.encode(), err.encode(), text, NAME, 0.0)


def problem() -> str:
    """Say why it cannot work here, or nothing."""
    return "" if importlib.util.find_spec("pydantic_monty") else "pip install 'jaxlm[sandbox]'"


def version() -> str:
    """Which interpreter it is: what was measured with another one does not hold."""
    return importlib.metadata.version("pydantic-monty")


def launch(request: Request) -> Launch:
    """There are no boxes."""
    raise NotImplementedError


BACKEND = Backend(
    NAME, problem, launch, languages=frozenset({"python"}), lower_bound=True, judge=judge, run=run, version=version
)
