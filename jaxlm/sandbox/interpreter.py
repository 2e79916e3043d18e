"""Find the Python that runs inside boxes, and the folders that it needs."""

from __future__ import annotations

import functools
import os
import sys

from jaxlm.errors import UserError
from jaxlm.sandbox.backends import Interpreter, ask

_ASK = """import os, sys
for word in (os.path.realpath(sys.executable), sys.base_prefix, sys.base_exec_prefix, sys.version.split()[0]):
    print(word)"""


@functools.cache
def find(path: str = "") -> Interpreter:
    """Find an interpreter: the one of this process, or another by its path.

    A virtual environment is followed to the Python behind it, so that a box needs no folder of a project.

    Raises: UserError.
    """
    path = path or sys.executable
    asked = ask(path, "-s", "-S", "-P", "-c", _ASK)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no message"])[0][:200]
        raise UserError(f"{path} is no Python for boxes: {reason}", "3.11 or newer is needed")
    executable, *prefixes, version = asked.stdout.split("\n")[:4]
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 11):
        raise UserError(f"{executable} is Python {version}", "boxes need 3.11 or newer")
    roots = {os.path.realpath(prefix) for prefix in prefixes}
    if not executable.startswith("/usr/") and not any(executable.startswith(f"{root}/") for root in roots):
        roots.add(os.path.dirname(executable))
    roots = {"/nix/store" if root.startswith("/nix/store/") else root for root in roots}
    for root in roots:
        if not os.access(root, os.R_OK | os.X_OK):
            raise UserError(f"{root}, the folder of the interpreter, cannot be read", "use another Python for the box")
    inner = {root for root in roots if any(root != other and root.startswith(f"{other}/") for other in roots)}
    kept = sorted(root for root in roots - inner if root != "/usr" and not root.startswith("/usr/"))
    return Interpreter(executable, tuple(kept), version)
