"""Find the Python that runs inside boxes, and the folders that it needs."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import NamedTuple

from jaxlm.errors import UserError

_ASK = """import os, sys
print(sys.version.split()[0])
for path in (sys.executable, sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)):
    print(os.path.realpath(path))"""


DID_NOT_RUN = 127
"""The exit code that `ask` returns for a program that does not run, or does not end in time."""


class Interpreter(NamedTuple):
    """A Python for boxes, and the folders that it needs."""

    executable: str
    roots: tuple[str, ...]
    version: str


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program that only answers. One that does not run has failed, with the reason as its message."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, DID_NOT_RUN, "", f"{command[0]} does not run: {error}")


@functools.cache
def find(path: str = "") -> Interpreter:
    """Find an interpreter: the one of this process, or another by its path.

    A virtual environment is followed to the Python behind it, so that a box needs no folder of a project.

    Raises: UserError.
    """
    path = path or sys.executable
    asked = ask(path, "-s", "-S", "-P", "-c", _ASK)
    lines = asked.stdout.splitlines()
    if asked.returncode or len(lines) != 5:  # an older Python does not know -P
        reason = (asked.stderr.strip().splitlines() or ["no message"])[0][:200]
        raise UserError(f"{path} is no Python for boxes: {reason}", "3.11 or newer is needed")
    version, executable, *folders = lines
    roots = set(folders)
    if not executable.startswith("/usr/") and not any(executable.startswith(f"{root}/") for root in roots):
        roots.add(os.path.dirname(executable))
    roots = {"/nix/store" if root.startswith("/nix/store/") else root for root in roots}
    for root in roots:
        if not os.access(root, os.R_OK | os.X_OK):
            raise UserError(f"{root}, the folder of the interpreter, cannot be read", "use another Python for the box")
    inner = {root for root in roots if any(root != other and root.startswith(f"{other}/") for other in roots)}
    kept = sorted(root for root in roots - inner if root != "/usr" and not root.startswith("/usr/"))
    return Interpreter(executable, tuple(kept), version)
