"""Choose the isolation of this machine by what it stops, not by what is installed.

The quick battery runs once for a kernel, user, backend and interpreter, and its result is kept in
`~/.cache/jaxlm/sandbox`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from pathlib import Path

from jaxlm.errors import UserError, did_you_mean
from jaxlm.sandbox import interpreter
from jaxlm.sandbox.backends import Backend, Sandbox, bare, bwrap, container, landlock, monty, seatbelt
from jaxlm.sandbox.battery import escapes
from jaxlm.sandbox.verdicts import HarnessError

BACKENDS = {one.BACKEND.name: one.BACKEND for one in (bwrap, landlock, seatbelt, monty, bare)}
"""From the strongest to the weakest; `none` is never taken unless it is named, and a container has its image's name."""
CONTAINER = "container:"


def kept_results() -> Path:
    """The folder of what was measured on this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "jaxlm" / "sandbox"


def _key(backend: Backend, python: interpreter.Interpreter) -> str:
    """Everything on which the result of the battery depends."""
    parts = [platform.release(), platform.machine(), str(os.getuid()), backend.name, bwrap.program(), *python.roots]
    parts += [python.executable, python.version, backend.version(), *sorted(backend.languages)]
    for path in sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".txt")):
        parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def weakness(backend: Backend, python: interpreter.Interpreter) -> str:
    """Say why a backend does not stop the quick battery here, or nothing. Tried at first use, then remembered."""
    file = kept_results() / f"{_key(backend, python)}.json"
    try:
        escaped = list(json.loads(file.read_text())["escaped"])
    except (OSError, ValueError, KeyError):
        try:
            tried = escapes.attempt_quick(Sandbox(backend, python))
        except HarnessError as error:
            return str(error)
        escaped = [one.escape.name for one in tried if one.succeeded]
        with contextlib.suppress(OSError):  # a machine without a writable home measures each time
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"backend": backend.name, "escaped": escaped}) + "\n")
    return f"does not hold: {', '.join(escaped)} succeed" if escaped else ""


def choose(name: str = "auto", python: str = "") -> Sandbox:
    """Take the strongest isolation that holds here.

    Args:
        name: `auto`, or a backend by its name, a container as `container:IMAGE`. `none` isolates nothing and must be
            named.
        python: path of the Python for the boxes; by default the one behind this process.

    Raises: UserError with the way out for this system, before anything is generated.
    """
    found = interpreter.find(python)
    if name != "auto":
        backend, found = _named(name, found)
        if reason := backend.problem() or ("" if name == "none" else weakness(backend, found)):
            raise UserError(f"the sandbox {name} does not work here: {reason}")
        return Sandbox(backend, found)
    reasons = []
    for backend in BACKENDS.values():
        if backend.name == "none":
            continue
        if not (reason := backend.problem() or weakness(backend, found)):
            return Sandbox(backend, found)
        reasons.append(f"{backend.name}: {reason}")
    raise UserError(f"nothing isolates code here ({'; '.join(reasons)})", _way_out())


def _named(name: str, python: interpreter.Interpreter) -> tuple[Backend, interpreter.Interpreter]:
    if name.startswith(CONTAINER) and name != CONTAINER:
        return container.of(name.removeprefix(CONTAINER))
    if name not in BACKENDS:
        raise UserError(f"no sandbox {name!r}", did_you_mean(name, ["auto", *BACKENDS, f"{CONTAINER}IMAGE"]))
    return BACKENDS[name], python


def _way_out() -> str:
    here = "--sandbox container:python:3.12-slim, with docker or podman"
    if sys.platform == "linux":
        here = "pip install 'jaxlm[sandbox]', allow user namespaces, or use a container"
    return f"{here}; `--sandbox none` isolates nothing"
