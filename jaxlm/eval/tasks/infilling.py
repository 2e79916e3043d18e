"""HumanEval with a gap: a line, some lines or a span to fill in (Bavarian et al. 2022)."""

from __future__ import annotations

from pathlib import Path

from jaxlm.errors import UserError, did_you_mean
from jaxlm.eval.code.problems import Problem, find_file, rows
from jaxlm.sandbox import Tests

SETS = {
    "single-line": "HumanEval-SingleLineInfilling",
    "multi-line": "HumanEval-MultiLineInfilling",
    "random-span": "HumanEval-RandomSpanInfilling",
    "random-span-light": "HumanEval-RandomSpanInfillingLight",
}


def problems(path: str | Path | None = None, part: str = "single-line") -> list[Problem]:
    """Read one of the four sets. Raises: UserError."""
    if part not in SETS:
        raise UserError(f"no infilling set {part!r}", did_you_mean(part, SETS))
    file = find_file(path, f"humaneval_infilling/{SETS[part]}.jsonl.gz", f"humaneval_infilling/{SETS[part]}.jsonl")
    made = []
    for row in rows(file, "task_id", "prompt", "suffix", "entry_point", "canonical_solution", "test"):
        # The tests of three problems use functions that stand before the gap's function, so they get the whole
        # reference.
        reference = row["prompt"] + row["canonical_solution"] + row["suffix"]
        tests = Tests(f"{row['test']}\ncheck(candidate)\n", (row["entry_point"],), reference)
        made.append(
            Problem(
                task_id=row["task_id"],
                prompt=row["prompt"],
                tests=tests,
                entry=row["entry_point"],
                reference=reference,
                before=row["prompt"],
                after=f"{row['suffix']}\n",
                suffix=row["suffix"],
            )
        )
    return made
