"""Judge many programs at once, in order, and stop cleanly."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from jaxlm.sandbox.backends import Sandbox
from jaxlm.sandbox.choose import choose
from jaxlm.sandbox.judge import judge, run_program
from jaxlm.sandbox.verdicts import Limits, Ran, Tests, Verdict


def grade(program: str, tests: Tests, limits: Limits | None = None, sandbox: Sandbox | None = None) -> Verdict:
    """Judge one program.

    Args:
        program: source text that a model wrote.
        tests: the tests of the problem.
        limits: what it may use.
        sandbox: the isolation; by default the strongest that holds here.

    Raises: HarnessError where the judge itself fails; UserError where nothing isolates.
    """
    sandbox = sandbox or choose()
    return judge(program, tests, limits or Limits(), sandbox)


def run(
    program: str,
    stdin: bytes = b"",
    language: str = "python",
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
) -> Ran:
    """Run one whole program in a box. Raises: HarnessError, UserError."""
    sandbox = sandbox or choose()
    return run_program(program, stdin, language, limits or Limits(), sandbox)


Work = tuple[str, Tests, Limits]


def grade_many(
    work: Iterable[Work], sandbox: Sandbox | None = None, workers: int = 0
) -> Generator[Verdict, None, None]:
    """Judge many programs, several at a time.

    Verdicts come in the order of the work. Whoever stops asking (an exception, Ctrl-C) ends all boxes within a moment.

    Args:
        work: (program, tests, limits) one after the other; read as far ahead as the workers need.
        sandbox: the isolation; by default the strongest that holds here.
        workers: programs at the same time; by default one a processor.

    Raises: HarnessError, UserError.
    """
    sandbox = sandbox or choose()
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or processors or 1
    cancel = threading.Event()
    waiting: deque[Future[Verdict]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="judge")
    try:
        for program, tests, limits in work:
            waiting.append(pool.submit(judge, program, tests, limits, sandbox, cancel))
            while len(waiting) >= 4 * workers or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        cancel.set()
        pool.shutdown(wait=True, cancel_futures=True)
