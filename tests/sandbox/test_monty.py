"""Monty: an interpreter without an operating system, so every score is a lower bound."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxlm.sandbox import HarnessError, Limits, Sandbox, Tests, choose, grade, run
from jaxlm.sandbox.backends import monty
from jaxlm.sandbox.choose import BACKENDS

ADD = Tests("assert candidate(1, 2) == 3\nassert candidate(5, b=6) == 11\n", names=("add",))
SHORT = Limits(cpu_seconds=1.0, idle_seconds=1.0, memory=128 << 20)


@pytest.fixture
def in_monty() -> Sandbox:
    if reason := BACKENDS["monty"].problem():
        pytest.skip(f"monty: {reason}")
    return choose("monty")


def test_monty_gives_lower_bounds(in_monty: Sandbox) -> None:
    kinds = {
        "passed": "def add(a, b): return a + b",
        "failed": "def add(a, b): return a - b",
        "exception": "def add(a, b):\n    raise KeyError('no')",
        "syntax": "def add(a, b) return a",
        "no_function": "def sub(a, b): return a - b",
        "not_plain": "class Same:\n    def __eq__(self, other): return True\ndef add(a, b): return Same()",
        "cpu_time": "def add(a, b):\n    while True: pass",
        "memory": "def add(a, b): return len([0] * 10**10)",
    }
    for kind, program in kinds.items():
        verdict = grade(program, ADD, SHORT, in_monty)
        assert (verdict.kind, verdict.sandbox) == (kind, "monty"), verdict
    assert in_monty.backend.lower_bound
    with pytest.raises(HarnessError, match="runs no bash"):
        grade(":", Tests("candidate", ("f",), language="bash"), SHORT, in_monty)
    with pytest.raises(HarnessError, match="monty runs no bash"):
        run("x=1", b"", "bash", SHORT, in_monty)
    with pytest.raises(HarnessError, match="never called"):
        grade(kinds["passed"], Tests("assert True", ("add",)), SHORT, in_monty)


def test_monty_prints_nothing_of_an_answer(in_monty: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    assert grade("print('loaded')\ndef add(a, b):\n    print('called')\n    return a + b", ADD, SHORT, in_monty).passed
    assert capfd.readouterr() == ("", "")


def test_monty_adds_up_the_time_of_calls(in_monty: Sandbox) -> None:
    """No call is too long, all together are; and what a program used is told, for the limits of others."""
    calls = Tests("for n in range(100_000): assert candidate(n, 0) == n", names=("add",))
    verdict = grade("def add(a, b):\n    for n in range(20_000): pass\n    return a + b", calls, SHORT, in_monty)
    assert (verdict.kind, verdict.text) == ("cpu_time", "more than 1 s in all")
    slow = "def add(a, b):\n    for n in range(200_000): pass\n    return a + b"
    assert grade(slow, ADD, Limits(cpu_seconds=60.0), in_monty).cpu_seconds > 0


def test_threads_that_ask_at_once_share_a_pool(in_monty: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    import pydantic_monty

    class Slow(contextlib.nullcontext):
        def __init__(self, **sizes: int) -> None:
            super().__init__()
            time.sleep(0.05)

        def checkout(self, **options: object) -> Slow:
            return self

    monkeypatch.setattr(pydantic_monty, "Monty", Slow)
    monkeypatch.setattr(monty, "_pool", functools.cache(monty._pool.__wrapped__))
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(lambda _: id(monty._session(SHORT)), range(4)))) == 1


def test_many_judgements_in_monty_do_not_wait_for_each_other(
    in_monty: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time, and two workers in all: each would hold one and wait for the other's."""
    import pydantic_monty

    both, mine, made, session = threading.Barrier(2), threading.local(), [], monty._session

    def waiting(limits: Limits):
        if getattr(mine, "holds", False):  # until both judgements hold one, or that cannot be
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(1)
        mine.holds = True
        return session(limits)

    with pydantic_monty.Monty(min_processes=2, max_processes=2, checkout_timeout=10) as pool:
        monkeypatch.setattr(monty, "_pool", lambda: pool)
        monkeypatch.setattr(monty, "_PAIRS", threading.BoundedSemaphore(1))
        monkeypatch.setattr(monty, "_session", waiting)
        right = "def add(a, b): return a + b"
        judges = [
            threading.Thread(target=lambda: made.append(grade(right, ADD, SHORT, in_monty).kind)) for _ in range(2)
        ]
        for judge in judges:
            judge.start()
        for judge in judges:
            judge.join()
    assert made == ["passed", "passed"] and monty.MOST_WORKERS == 256
