"""Code that a model wrote, run and judged in isolation.

    verdict = grade(program, Tests("assert candidate(2) == 4", names=("double",)))

The program lives in one box and the tests in another; between them passes plain data, and the verdict has its own way
out. See docs/sandbox.md for what is promised, against whom, and what is not.
"""

from jaxlm.sandbox.backends import Sandbox
from jaxlm.sandbox.choose import choose
from jaxlm.sandbox.pool import grade, grade_many, run
from jaxlm.sandbox.verdicts import HarnessError, Limits, Ran, Tests, Verdict

__all__ = ["HarnessError", "Limits", "Ran", "Sandbox", "Tests", "Verdict", "choose", "grade", "grade_many", "run"]
