"""HumanEval: 164 functions to complete from signature and docstring (Chen et al. 2021)."""

from __future__ import annotations

from pathlib import Path

from jaxlm.eval.code.problems import Problem, find_file, rows
from jaxlm.eval.code.programs import parse
from jaxlm.sandbox import Tests

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""As in the paper, section 3.1."""
QUESTION = "Complete this Python function, and show the whole function.\n\n```python\n{code}\n```"
"""For chat models."""
FILES = ("humaneval/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl")


def problem(row: dict) -> Problem:
    """Make a problem of a row. The tests' process runs the prompt too: HumanEval/32, 38 and 50 use its functions."""
    # A prompt without a docstring is no whole function yet.
    prelude = row["prompt"] if parse(row["prompt"]) else f"{row['prompt']}    pass\n"
    tests = Tests(f"{row['test']}\ncheck(candidate)\n", (row["entry_point"],), prelude)
    return Problem(
        task_id=row["task_id"],
        prompt=row["prompt"],
        tests=tests,
        entry=row["entry_point"],
        reference=row["prompt"] + row["canonical_solution"],
        before=row["prompt"],
        after="\n",
        stops=STOPS,
        question=QUESTION.format(code=row["prompt"].strip()),
    )


def problems(path: str | Path | None = None) -> list[Problem]:
    """Read the set. Raises: UserError."""
    file = find_file(path, *FILES)
    needed = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return [problem(row) for row in rows(file, *needed)]
