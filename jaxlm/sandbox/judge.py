"""Judge a program: one box for the program, another for the tests, and a verdict that the program cannot touch."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from jaxlm.sandbox.backends import Sandbox
from jaxlm.sandbox.box import Box, Job
from jaxlm.sandbox.inside import answer, bash_tests, confine, wire, worker
from jaxlm.sandbox.inside import tests as tests_role
from jaxlm.sandbox.verdicts import KINDS, HarnessError, Limits, Ran, Tests, Verdict

LIMITED = {
    "cpu_time": "more processor time than allowed",
    "wall_time": "waited without computing",
    "memory": "more memory than allowed",
    "output": "printed more than allowed",
}
COMPILED = (answer, bash_tests, confine, tests_role, worker)
"""Imported so that Python keeps them compiled: boxes start faster."""

TICK = 0.05
MAX_PROGRAM = 1 << 20
LAST_WORDS = 10.0
"""Seconds in which a box may still end by itself once the tests have no answer from it; many, for a busy machine."""


class Cancelled(Exception):
    """Somebody asked to stop."""


class Stop(NamedTuple):
    """Why watching ended: `verdict`, `ended`, or a kind of verdict with its reason."""

    kind: str
    text: str = ""
    box: Box | None = None


class Watch:
    """Watch boxes until a message comes, one ends, or one uses more than it may."""

    def __init__(self, boxes: Sequence[Box], limits: Limits, cancel: threading.Event | None) -> None:
        self.boxes, self.limits, self.cancel = boxes, limits, cancel
        self.began = time.monotonic()
        self.looked = self.began
        self.idle = 0.0
        self.selector = selectors.DefaultSelector()
        self.handles: list[int] = []  # they are readable when a process ends
        for box in boxes:
            self.selector.register(box.status, selectors.EVENT_READ, box)
            if hasattr(os, "pidfd_open"):
                self.handles.append(os.pidfd_open(box.process.pid))
                self.selector.register(self.handles[-1], selectors.EVENT_READ, box)
            for number in box.readers.values():
                self.selector.register(number, selectors.EVENT_READ, box)

    def step(self, messages: Box | None) -> Stop | None:
        """Wait a moment. Returns why to stop, if so; `messages` is the box whose status is a message to read."""
        if self.cancel and self.cancel.is_set():
            raise Cancelled
        events = self.selector.select(TICK)
        for key, _ in events:
            box: Box = key.data
            if key.fileobj is box.status:
                if not box.ready:
                    box.greet()
                    if box is not messages:
                        self.selector.unregister(box.status)
                elif box is messages:
                    self.selector.unregister(box.status)
                    return Stop("verdict")
            elif key.fd in self.handles:
                self.selector.unregister(key.fd)
            elif stop := self._printed(key.fd, box):
                return stop
        return self._ended() or (self._used() if time.monotonic() - self.looked > TICK else None)

    def _printed(self, number: int, box: Box) -> Stop | None:
        too_much = box.drain()
        if number not in box.readers.values():
            self.selector.unregister(number)
        return Stop("output", f"more than {box.limits.output >> 20} MB printed", box) if too_much else None

    def _ended(self) -> Stop | None:
        for box in self.boxes:
            if not box.ended and box.process.poll() is not None:
                if not box.ready:
                    box.greet()
                box.ended = True
                return Stop("ended", "", box)
        return None

    def _used(self) -> Stop | None:
        now = time.monotonic()
        waited, self.looked = min(now - self.looked, 2 * TICK), now
        running = False
        for box in self.boxes:
            if box.ready and not box.ended:
                if excess := box.excess():
                    return Stop(**excess, box=box)
                running |= box.seen.running or not box.seen.processes  # none: its engine puts it up or takes it down
            running |= not box.ready
        # A tick counts as idle only if it was seen so: a judge that had to wait for the processor adds no time of its
        # own.
        self.idle = 0.0 if running else self.idle + waited
        if self.idle > self.limits.idle_seconds:
            return Stop("wall_time", f"waited {self.limits.idle_seconds:g} s without computing", self.boxes[0])
        if now - self.began > self.limits.wall_seconds:
            raise HarnessError(f"no end after {self.limits.wall_seconds:g} s: this machine is too busy to judge")
        return None

    def until(self, messages: Box | None) -> Stop:
        """Watch until there is a reason to stop."""
        while not (stop := self.step(messages)):
            continue
        return stop

    def close(self) -> None:
        self.selector.close()
        for number in self.handles:
            os.close(number)


def judge(
    program: str, tests: Tests, limits: Limits, sandbox: Sandbox, cancel: threading.Event | None = None
) -> Verdict:
    """Run tests against a program, each in a box of its own.

    The verdict is what the tests' process sends over its own socket; nothing that the program sends is one. A limit
    that is seen from outside before it counts instead, and so does one that a passed program is beyond at its end.

    Raises: HarnessError where the isolation or the tests themselves fail; Cancelled.
    """
    if not isinstance(program, str) or len(program) > MAX_PROGRAM:
        return Verdict("syntax", f"a program of more than {MAX_PROGRAM >> 20} MB, or no text", {}, sandbox.name)
    sandbox.must_speak(tests.language)
    if sandbox.backend.judge:
        return sandbox.backend.judge(program, tests, limits, cancel)
    with ExitStack() as stack:
        texts = {"program": program, "classes": list(tests.classes)}
        code = {"tests": tests.source, "prelude": tests.prelude, "names": list(tests.names)}
        near, far = socket.socketpair()
        with near, far:
            answering = Job("answer", tests.language, texts, near.fileno())
            testing = Job("tests", tests.language, code, far.fileno())
            boxes = [stack.enter_context(closing(Box(sandbox, job, limits))) for job in (answering, testing)]
        return _verdict(boxes[0], boxes[1], limits, sandbox.name, cancel)


def _verdict(program: Box, tests: Box, limits: Limits, name: str, cancel: threading.Event | None) -> Verdict:
    with closing(Watch([program, tests], limits, cancel)) as watch:
        stop = watch.until(tests)
        while stop.kind == "ended" and stop.box is program:  # the tests still say what they waited for
            stop = watch.until(tests)
        # The tests' process ends right after its verdict, so its end may be seen first.
        spoke = stop.kind == "verdict" or (stop.kind == "ended" and stop.box is tests)
        record = _message(tests) if spoke else {"kind": stop.kind, "text": stop.text}
        if record["kind"] == "passed" and not program.ended and (excess := program.excess()):
            record = excess
        if record["kind"] == "gone":
            record = {**record, **_gone(program, watch)}
    return finish(record, name, round(program.seen.cpu_seconds, 2))


def _message(box: Box) -> dict:
    with box.status.makefile("rb") as file:
        message = file.read()
    if not message:
        status = box.kill()
        return {**from_status(status, box), "text": f"in the tests: {ending(status)}"}
    try:
        record = wire.decode(message[4:])
    except wire.BadMessage as error:
        raise HarnessError(f"the tests' process ended without a verdict: {error}") from None
    if type(record) is not dict or record.get("kind") not in (*KINDS, "gone", "harness_error"):
        raise HarnessError("the tests' process sent no verdict")
    return record


def _gone(box: Box, watch: Watch) -> dict:
    """Find out why the program's box no longer answers."""
    end = time.monotonic() + LAST_WORDS
    while not box.ended and time.monotonic() < end:
        stop = watch.step(None)
        if stop and stop.kind not in {"ended", "verdict"}:
            return {"kind": stop.kind, "text": stop.text}
    if not box.ended:
        return {"kind": "crashed", "text": "closed its channel and went on"}
    return from_status(box.kill(), box)


def from_status(status: int, box: Box) -> dict:
    """Turn the way a box ended into a verdict."""
    if excess := box.excess():
        return excess
    if status == -signal.SIGXCPU or (status == -signal.SIGKILL and box.seen.cpu_seconds > 0.5 * box.limits.cpu_seconds):
        return {"kind": "cpu_time", "text": f"more than {box.limits.cpu_seconds:g} s of processor time"}
    if status == -signal.SIGSYS:
        return {"kind": "violation", "text": "a forbidden system call", "tried": ["system call"]}
    return {"kind": "crashed", "text": ending(status)}


def ending(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"left with status {status}"
    known = {number.value: number.name for number in signal.Signals}
    return f"killed by {known.get(-status, f'signal {-status}')}"


def finish(record: dict, name: str, cpu_seconds: float) -> Verdict:
    """Make the verdict from the record of the tests' process. Raises: HarnessError."""
    record = dict(record)
    kind, text = record.pop("kind"), str(record.pop("text", ""))
    if kind == "harness_error":
        raise HarnessError(text)
    if kind in LIMITED:  # whether the kernel or the judge saw it first must not show
        record, text = {}, LIMITED[kind]
    tried = record.get("tried") or []
    if tried and kind in {"exception", "failed", "not_plain", "crashed"}:
        text, kind = f"tried: {', '.join(map(str, tried))}; then {kind}: {text}", "violation"
    return Verdict(kind, text, {key: value for key, value in record.items() if value}, name, cpu_seconds)


def run_program(
    program: str, stdin: bytes, language: str, limits: Limits, sandbox: Sandbox, cancel: threading.Event | None = None
) -> Ran:
    """Run a whole program in a box. Raises: HarnessError, Cancelled."""
    sandbox.must_speak(language)
    if sandbox.backend.run:
        return sandbox.backend.run(program, stdin, limits, cancel)
    job = Job("run", language, {"program": program}, stdin=stdin)
    with closing(Box(sandbox, job, limits)) as box:
        with closing(Watch([box], limits, cancel)) as watch:
            stop = watch.until(None)
        status = box.kill()
        box.drain()
        record = from_status(status, box) if stop.kind == "ended" else {"kind": stop.kind, "text": stop.text}
        kind = "finished" if record["kind"] == "crashed" and status >= 0 else record["kind"]
        out, err = bytes(box.output["stdout"]), bytes(box.output["stderr"])
        return Ran(kind, status, out, err, record["text"], sandbox.name, round(box.seen.cpu_seconds, 2))
