"""Numbers that are measured once on this machine and kept, such as the times of references: lines of JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from jaxlm.eval.code.problems import Problem
from jaxlm.sandbox import Sandbox
from jaxlm.sandbox.choose import kept_results


def key(problem: Problem, programs: Iterable[str], sandbox: Sandbox) -> str:
    """A name of everything on which a result depends: the tests, some programs, and what runs them."""
    python, backend = sandbox.interpreter, sandbox.backend
    parts = [
        problem.tests.source,
        problem.tests.prelude,
        *problem.tests.names,
        sandbox.name,
        python.executable,
        python.version,
    ]
    parts += [backend.version(), *programs]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]


def read(name: str) -> dict[str, float]:
    """Read the numbers in a file of `kept_results` by their keys. A line that was cut short is measured again."""
    known: dict[str, float] = {}
    try:
        lines = (kept_results() / name).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            one, number = json.loads(line)
            known[str(one)] = float(number)
        except (ValueError, TypeError):
            continue
    return known


def add(name: str, one: str, number: float) -> None:
    """Append a number. Where nothing can be written, it is measured again next time."""
    file = kept_results() / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as kept:
            kept.write(json.dumps([one, number]) + "\n")
    except OSError:
        return
