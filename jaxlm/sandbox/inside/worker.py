"""The program inside a box: read the job, give up every right, tell the judge, then play one role.

Roles: `answer` holds the program that a model wrote and calls its functions on request; `tests` runs the tests and
decides the verdict; `run` runs a whole program. It imports nothing that is slow, and it is the one place that executes
code of others.
"""

import gc
import os
import sys

from . import confine, wire

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself would cost milliseconds in every box
    from collections.abc import Callable
    from typing import Any

ANSWER_FILE = "<answer>"


def execute(source: str, file: str, namespace: dict) -> None:
    """Run source text in a namespace. This is the only `exec` of jaxlm, and it is always inside a box."""
    exec(compile(source, file, "exec", dont_inherit=True), namespace)


def module(name: str) -> dict:
    """Make a module that dataclasses and typing find by its name. Returns its namespace."""
    made: Any = type(sys)(name)
    made.__dict__["__builtins__"] = __builtins__
    sys.modules[name] = made
    return made.__dict__


def line_in(file: str, error: BaseException) -> int:
    """Find the innermost line of a file that an exception passed through; 0 where there is none."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno or 0
        trace = trace.tb_next
    return line


def seed_random(source: str) -> None:
    """Give code that uses `random` the same numbers each time, so that a verdict does not change from run to run."""
    if "random" in source:
        import random

        random.seed(0)


def main(number: int) -> None:
    """Play the role of the job that descriptor `number` holds."""
    job = wire.decode(wire.read_all(number))
    status = job["status"]
    play = _role(job)
    sys.argv[:] = ["answer"]
    del sys.path[0]  # the folder of this package
    try:
        confine.confine(job)
        os.close(os.open(os.__file__, os.O_RDONLY))  # a library that cannot be read would fail right programs
    except (OSError, ImportError, ValueError) as error:
        os.write(status, f"E{type(error).__name__}: {error}".encode(errors="replace")[:500])
        os._exit(70)
    os.write(status, b"R")
    if os.read(status, 1) != b"G":
        os._exit(71)
    gc.freeze()  # what is here stays to the end, so collecting it again would only cost time
    play(job)


def _role(job: dict) -> "Callable[[dict], None]":
    """Import what the role needs while the folder of this file can still be read."""
    if job["role"] == "tests":
        from . import tests

        if job["language"] == "bash":
            from . import bash_tests  # noqa: F401
        return tests.main
    from . import answer

    return answer.run if job["role"] == "run" else answer.main
