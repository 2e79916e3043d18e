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


def read_all(number: int) -> bytes:
    """Read a descriptor to its end and close it."""
    parts = []
    while part := os.read(number, 1 << 20):
        parts.append(part)
    os.close(number)
    return b"".join(parts)


class Channel:
    """Messages over two pipes: four bytes of length, then a message of `wire`."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes = reads, writes

    def send(self, payload: bytes) -> None:
        """Send an encoded message."""
        data = memoryview(len(payload).to_bytes(4, "little") + payload)
        while data:
            data = data[os.write(self.writes, data) :]

    def receive(self) -> bytes | None:
        """Receive an encoded message, or None when the other side is gone. Raises: BadMessage."""
        head = self._exactly(4)
        if head is None:
            return None
        size = int.from_bytes(head, "little")
        if size > wire.MAX_BYTES + 1024:
            raise wire.BadMessage("a message longer than allowed")
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            try:
                part = os.read(self.reads, min(size - len(data), 1 << 20))
            except ConnectionError:
                return None
            if not part:
                return None
            data += part
        return bytes(data)


def seed_random(source: str) -> None:
    """Give code that uses `random` the same numbers each time, so that a verdict does not change from run to run."""
    if "random" in source:
        import random

        random.seed(0)


def main(number: int) -> None:
    """Play the role of the job that descriptor `number` holds."""
    job = wire.decode(read_all(number))
    status = job["status"]
    play = _role(job)
    sys.argv[:] = ["answer"]
    sys.path[:] = [path for path in sys.path if path != job["box"]]
    try:
        confine.confine(job)
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
