"""HumanEval with a bug to mend, after HumanEvalFix of OctoPack (Muennighoff et al. 2023); ours are planted by rule.

The faulty program is in the question with its docstring. A program that is left as it is passes nothing: a bug is kept
only where the tests fail on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxlm.errors import UserError
from jaxlm.eval.code.bugs import Bug
from jaxlm.eval.code.problems import Problem, asked


def problems(right: Sequence[Problem], bugs: Mapping[str, Bug]) -> list[Problem]:
    """Ask to mend each faulty program; the answer begins with the prompt of HumanEval and is judged by its tests.

    Raises: UserError where no bug could be planted.
    """
    made = []
    for problem in right:
        if bug := bugs.get(problem.task_id):
            question = f"Fix the bug in {problem.entry}.\n\n{bug.program}"
            chat = f"Fix the bug in `{problem.entry}`, and show the whole function.\n\n```python\n{bug.program}```"
            made.append(replace(problem, prompt=asked(question, problem.before), question=chat))
    if not made:
        raise UserError("no bug could be planted into these problems", "take more of them: --limit")
    return made
