"""Ways to isolate, one small file each, behind one interface."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxlm.sandbox.verdicts import HarnessError, Limits, Ran, Tests, Verdict

SHELL = "/usr/bin/bash" if os.path.exists("/usr/bin/bash") else "/bin/bash"
LANGUAGES = frozenset({"python", "bash"})


class Interpreter(NamedTuple):
    """A Python for boxes, and the folders that it needs."""

    executable: str
    roots: tuple[str, ...]
    version: str


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
    box: str
    """The folder that holds the package `inside`, by its name inside."""
    readable: tuple[str, ...] = ()
    filters: tuple[bytes, ...] = ()
    """Programs for seccomp, which the worker loads."""
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


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program that only answers. One that does not run has failed, with the reason as its message."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} does not run: {error}")


INSIDE = Path(__file__).parents[1] / "inside"
START = "import sys; sys.path.insert(0, {box!r}); from inside import worker; worker.main({job})"


def environment(work: str, language: str) -> dict[str, str]:
    """The whole environment of a box."""
    names = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TZ": "UTC", "HOME": work}
    return {**names, "PYTHONHASHSEED": "0"} if language == "python" else names


def python_command(interpreter: Interpreter, box: str, job: int) -> list[str]:
    """The worker's command. `-I` would ignore PYTHONHASHSEED, so its parts stand here one by one."""
    return [interpreter.executable, "-s", "-S", "-P", "-B", "-c", START.format(box=box, job=job)]
