"""HumanEval in bash: 158 functions, translated by MultiPL-E (Cassano et al. 2022). The set has no references."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.eval.code.problems import Problem, find_file, rows
from jaxlm.sandbox import Tests
from jaxlm.sandbox.backends import SHELL

FILES = ("humaneval_sh/humaneval-sh.jsonl", "humaneval_sh/humaneval-sh.jsonl.gz")
_HEAD = re.compile(r'\}\n\ncandidate\(\) \{\n\s+(\w+) "\$@"\n\}\n')


def problem(row: dict) -> Problem:
    """Make a problem of a row. Its tests begin with the end of the function and a `candidate` of their own; both go.

    Raises: UserError for tests of another form.
    """
    head = _HEAD.match(row["tests"])
    if head is None:
        raise UserError(f"the tests of {row['name']} do not begin with a candidate", "is this MultiPL-E's bash set?")
    return Problem(
        task_id=row["name"],
        prompt=row["prompt"],
        tests=Tests(row["tests"][head.end() :], (head[1],), language="bash"),
        entry=head[1],
        before=row["prompt"],
        after=f'\n}}\n\n{head[1]} "$@"\n',
        stops=tuple(row["stop_tokens"]),
        always_stop=True,
    )


def problems(path: str | Path | None = None) -> list[Problem]:
    """Read the set. Raises: UserError, also where bash is not installed."""
    if not Path(SHELL).exists():
        raise UserError(f"{SHELL} is missing", "humaneval-sh needs bash: install it")
    return [problem(row) for row in rows(find_file(path, *FILES), "name", "prompt", "tests", stop_tokens=list)]
