"""Bug detection: is this program right? Each problem is asked twice, with the reference and with a planted bug.

Both are printed alike (`bugs.plain`). A program is flagged when the answer is no; precision, recall and F1 are those of
flags on faulty programs. Always answering "wrong" has recall 1 and F1 2/3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from jaxlm.errors import UserError
from jaxlm.eval.code.bugs import Bug, plain
from jaxlm.eval.code.estimate import Estimate, ratio
from jaxlm.eval.code.metrics import MetricReport
from jaxlm.eval.code.problems import Problem, asked
from jaxlm.eval.code.samples import Sample

ANSWERS, CHAT_ANSWERS = (" yes", " no"), ("Yes", "No")
_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def problems(right: Sequence[Problem], bugs: Mapping[str, Bug]) -> list[Problem]:
    """Two questions for each problem with a bug: `ID/right` and `ID/wrong`. Raises: UserError where there is none."""
    made = []
    for problem in right:
        if bug := bugs.get(problem.task_id):
            for name, program in (("right", plain(problem.reference, problem.entry)), ("wrong", bug.program)):
                question = f"{program}\nDoes {problem.entry} do what its docstring says? Answer yes or no."
                chat = f"```python\n{program}```\n{question[len(program) + 1 :]}"
                one = replace(problem, task_id=f"{problem.task_id}/{name}", prompt=asked(question).rstrip())
                made.append(replace(one, question=chat, stops=("\n",)))
    if not made:
        raise UserError("no bug could be planted into these problems", "take more of them: --limit")
    return made


def flag(answer: str) -> bool | None:
    """Whether an answer calls the program wrong; None where it says neither yes nor no."""
    word = _WORD.search(answer)
    return word[1].lower() == "no" if word else None


def scores(flags: Iterable[tuple[str, bool | None]]) -> dict[str, Estimate]:
    """Precision, recall, F1 and accuracy with intervals over problems.

    Args:
        flags: `ID/right` or `ID/wrong`, and whether it was flagged; what is unclear flags nothing and is not accurate.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, flagged in flags:
        problem, _, side = name.rpartition("/")
        row = counts.setdefault(problem, dict.fromkeys(("tp", "fp", "fn", "accurate", "all"), 0))
        wrong = side == "wrong"
        row["tp"] += bool(wrong and flagged)
        row["fp"] += bool(not wrong and flagged)
        row["fn"] += bool(wrong and not flagged)
        row["accurate"] += flagged is wrong
        row["all"] += 1
    rows = list(counts.values())

    def sums(names: Sequence[str]) -> list[float]:
        return [float(sum(row[name] for name in names)) for row in rows]

    def share(*above: str, of: Sequence[str]) -> Estimate:
        items = round(sum(sums(list(dict.fromkeys(of)))))  # F1 counts tp twice below
        return ratio(sums(above), sums(of), items)

    return {
        "precision": share("tp", of=("tp", "fp")),
        "recall": share("tp", of=("tp", "fn")),
        "F1": share("tp", "tp", of=("tp", "tp", "fp", "fn")),
        "accuracy": share("accurate", of=("all",)),
    }


def report(samples: Sequence[Sample], protocol: str, sandbox: str) -> MetricReport:
    """Add up answers, beside those who always flag and never flag; `sandbox` is where tests found the bugs."""
    flags = [(sample.task_id, flag(sample.completion)) for sample in samples]
    names = [name for name, _ in flags]
    always = {text: scores([(name, value) for name in names]) for text, value in BASELINES.items()}
    unclear = sum(flagged is None for _, flagged in flags)
    answered = {"answered no": sum(flagged is True for _, flagged in flags), "neither yes nor no": unclear}
    return MetricReport(
        "bug-detection", len(samples), "programs, right and faulty", scores(flags), always, protocol, answered, sandbox
    )


BASELINES = {"always wrong": True, "always right": False}
