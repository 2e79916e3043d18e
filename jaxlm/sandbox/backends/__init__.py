"""Ways to isolate, one small file each, behind one interface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxlm.sandbox.interpreter import Interpreter
from jaxlm.sandbox.verdicts import HarnessError, Limits, Ran, Tests, Verdict

SHELL = "/usr/bin/bash" if os.path.exists("/usr/bin/bash") else "/bin/bash"
LANGUAGES = frozenset({"python", "bash"})


@dataclass(frozen=True)
class Request:
    """One box to start."""

    interpreter: Interpreter
    language: str
    limits: Limits
    job: int
    """Descriptor that holds the job."""
    info: int
    """Descriptor for a backend that reports the number of the first process inside."""
    folder: Path | None = None
    """An empty folder of the machine, for a backend that brings no file system of its own."""


@dataclass(frozen=True)
class Launch:
    """How to start a box, and what its worker must do to itself before anything else."""

    command: tuple[str, ...]
    work: str
    """The folder to write in, by its name inside."""
    readable: tuple[str, ...] = ()
    filters: tuple[bytes, ...] = ()
    """Programs for seccomp, which the worker loads."""
    keep: tuple[int, ...] = ()
    """More descriptors that the command needs; closed after the start."""
    landlock: dict[str, list[str]] | None = None
    """Folders that the worker may read, and `devices`; it closes everything else to itself."""
    reports: bool = False
    """The backend writes the number of the first process inside to `Request.info`."""
    measures: bool = False
    """The backend writes lines to `Request.info`: `processes.Usage`, files and bytes written, of a box that is not ours
    to see."""
    end: tuple[str, ...] = ()
    """A command that ends a box whose processes are not children of its own."""
    environment: Mapping[str, str] | None = None
    """Of the command; None: the box's own, which leaks nothing of ours into it."""


@dataclass(frozen=True)
class Backend:
    """A way to isolate."""

    name: str
    problem: Callable[[], str]
    """Says why it cannot work here, or nothing."""
    launch: Callable[[Request], Launch]
    owns_files: bool = True
    """Its boxes have a file system of their own, gone with them."""
    languages: frozenset[str] = LANGUAGES if os.path.exists(SHELL) else LANGUAGES - {"bash"}
    lower_bound: bool = False
    """Its Python is not all of Python, so right answers may fail: every number says so."""
    judge: Callable[[str, Tests, Limits, threading.Event | None], Verdict] | None = None
    """Judges by itself, without boxes."""
    run: Callable[[str, bytes, Limits, threading.Event | None], Ran] | None = None
    """Runs a whole program by itself."""
    version: Callable[[], str] = str
    """Which interpreter it brings of its own, for results that are kept."""


@dataclass(frozen=True)
class Sandbox:
    """An isolation, with the Python for its boxes."""

    backend: Backend
    interpreter: Interpreter

    @property
    def name(self) -> str:
        return self.backend.name

    def must_speak(self, language: str) -> None:
        """Refuse a language that cannot run here. Raises: HarnessError."""
        if language not in self.backend.languages:
            reason = f": {SHELL} is missing" if language == "bash" and not os.path.exists(SHELL) else ""
            raise HarnessError(f"{self.name} runs no {language}{reason}")


INSIDE = Path(__file__).parents[1] / "inside"
START = "import sys; sys.path.insert(0, {box!r}); from inside import {program}; {program}.main({argument!r})"


def environment(work: str) -> dict[str, str]:
    """The whole environment of a box."""
    return {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "HOME": work, "PYTHONHASHSEED": "0"}


def python_command(python: str, box: str, program: str, argument: int | str) -> list[str]:
    """The command of a program of `inside`. `-I` would ignore PYTHONHASHSEED, so its parts stand here one by one.

    Args:
        python: the interpreter.
        box: the folder that holds the package `inside`, as the command sees it.
        program: `worker`, with the descriptor that holds the job, or `relay`, with the folder to write in.
        argument: what the program is called with.
    """
    start = START.format(box=box, program=program, argument=argument)
    return [python, "-s", "-S", "-P", "-B", "-c", start]
