"""HumanEval by way of an explanation, after HumanEvalExplain of OctoPack (Muennighoff et al. 2023, section 3.1).

The model explains the reference, whose name and docstring it does not see, in no more characters than the docstring
has. What the explanation copies of the code (20 characters and more) is taken out. Then the same model writes the code
from the explanation and a signature without the name, and the tests judge it.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxlm.errors import UserError
from jaxlm.eval.code.estimate import Estimate, interval
from jaxlm.eval.code.problems import Problem, asked
from jaxlm.eval.code.programs import parse
from jaxlm.eval.code.samples import Sample

NAME = "function_a"
"""Stands for the function's own name."""
COPIED = 20
STOPS = ("\nQuestion:", "\n\n\n")


@dataclass(frozen=True)
class Explained:
    """A problem taken apart."""

    problem: Problem
    """The second step, without its question: signature in front, tests of the neutral name."""
    code: str
    """The reference without its docstring, under the neutral name."""
    docstring: str

    def ask(self) -> Problem:
        """The first step: explain the code."""
        question = f"{self.code}\nDescribe in words what {NAME} does, in at most {len(self.docstring)} characters."
        chat = f"```python\n{self.code}```\n{question[len(self.code) + 1 :]} Write no code."
        return replace(self.problem, prompt=asked(question), question=chat, stops=STOPS)

    def write(self, explanation: str) -> Problem:
        """The second step: write the code from an explanation."""
        question = f"Write a Python function as it is described.\n\n{explanation}".rstrip()
        chat = f"{question}\n\nIt begins with:\n\n```python\n{self.problem.before}```"
        return replace(self.problem, prompt=asked(question, self.problem.before), question=chat)

    def cleaned(self, text: str) -> str:
        """An explanation without what it copies of the code, and no longer than the docstring."""
        text = without_copies(text.strip(), self.code)
        return text[: len(self.docstring)].strip()


def take_apart(problem: Problem) -> Explained:
    """Split a reference into signature, docstring and code, under a neutral name.

    Raises: UserError for a reference without a docstring.
    """
    tree = parse(problem.reference)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry and (found := _docstring(node)):
            lines, (text, begin, end) = problem.reference.splitlines(keepends=True), found
            head, code = "".join(lines[:begin]), "".join(lines[:begin] + lines[end:]).lstrip("\n")
            name = re.compile(rf"\b{re.escape(problem.entry)}\b")
            tests = replace(problem.tests, names=(NAME, *problem.tests.names[1:]))
            renamed = replace(problem, before=name.sub(NAME, head), tests=tests, entry=NAME)
            renamed = replace(renamed, reference=name.sub(NAME, problem.reference))
            return Explained(renamed, name.sub(NAME, code), text)
    raise UserError(f"{problem.task_id} has no docstring to compare an explanation with", "is this HumanEval?")


def _docstring(function: ast.FunctionDef) -> tuple[str, int, int] | None:
    """The docstring with its lines. In HumanEval/115 an import stands before it."""
    for node in function.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return inspect.cleandoc(node.value.value), node.lineno - 1, node.end_lineno or node.lineno
    return None


def without_copies(text: str, code: str) -> str:
    """Take out every stretch of 20 characters and more that stands in the code."""
    kept, place = [], 0
    while place < len(text):
        end = place + COPIED
        if end <= len(text) and text[place:end] in code:
            while end < len(text) and text[place : end + 1] in code:
                end += 1
            place = end
        else:
            kept.append(text[place])
            place += 1
    return "".join(kept)


def second_steps(
    explained: Sequence[Explained], explanations: Sequence[Sample], empty: bool
) -> dict[tuple[str, int], Problem]:
    """The problems of the second step by problem and number; `empty` leaves the explanations out, as the baseline."""
    table = {one.problem.task_id: one for one in explained}
    made = {}
    for sample in explanations:
        one = table[sample.task_id]
        made[sample.task_id, sample.number] = one.write("" if empty else one.cleaned(sample.completion))
    return made


def chrf(pairs: Sequence[tuple[str, str, str]]) -> tuple[str, Estimate]:
    """chrF of explanations against docstrings, averaged over problems (Popovic 2015).

    Args:
        pairs: problem, explanation, docstring.

    Returns: its name with version, and the mean with its interval, from 0 to 1.

    Raises: UserError where sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise UserError("chrF needs sacrebleu", "pip install 'jaxlm[eval]'") from None
    metric = sacrebleu.CHRF()
    by_problem: dict[str, list[float]] = {}
    for task_id, explanation, docstring in pairs:
        score = metric.sentence_score(explanation, [docstring]).score / 100 if explanation else 0.0
        by_problem.setdefault(task_id, []).append(score)
    return f"chrF2 (sacrebleu {sacrebleu.__version__})", interval([sum(s) / len(s) for s in by_problem.values()])
