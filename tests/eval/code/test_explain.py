"""Explanations: what the model sees, what is taken out of its words, and chrF."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.samples import Sample
from jaxlm.eval.tasks import humaneval, humaneval_explain
from jaxlm.sandbox import Limits, Sandbox, Tests, grade

REFERENCE = '''import math


def area(r):
    """Area of a circle.

    >>> area(0)
    """
    if r < 0:
        return area(-r)
    return math.pi * r * r
'''
PROBLEM = Problem("P/0", "", Tests("assert round(candidate(-1), 2) == 3.14", ("area",)), "area", REFERENCE)


def test_the_two_steps(sandbox: Sandbox) -> None:
    one = humaneval_explain.take_apart(PROBLEM)
    assert (
        one.docstring == "Area of a circle.\n\n>>> area(0)"
        and one.problem.before == "import math\n\n\ndef function_a(r):\n"
    )
    first = one.ask()
    assert "area" not in first.prompt.lower() and "in at most 30 characters" in first.prompt
    assert one.code in first.question and "circle" not in first.question
    second = one.write("A circle's size.")
    assert second.prompt.endswith("A circle's size.\n\nAnswer:\nimport math\n\n\ndef function_a(r):\n")
    assert "area" not in second.prompt and "area" not in second.question and "pi" not in second.prompt
    verdict = grade(second.program("    return math.pi * r * r\n"), second.tests, Limits(), sandbox)
    assert verdict.passed
    assert grade(one.problem.reference, one.problem.tests, Limits(), sandbox).passed
    with pytest.raises(UserError, match="has no docstring"):
        humaneval_explain.take_apart(Problem("P/1", "", PROBLEM.tests, "area", "def area(r): return r\n"))


def test_what_is_copied_is_taken_out() -> None:
    one = humaneval_explain.take_apart(PROBLEM)
    assert humaneval_explain.without_copies("It is: return math.pi * r * r!", one.code) == "It is:!"
    assert humaneval_explain.without_copies("return math.pi", one.code) == "return math.pi"  # fewer than 20 characters
    assert one.cleaned("It is: return math.pi * r * r!") == "It is:!"
    assert one.cleaned("  Squares r and multiplies it by a constant.") == "Squares r and multiplies it by"
    steps = humaneval_explain.second_steps([one], [Sample("P/0", 0, "Doubles."), Sample("P/0", 1, one.code)], False)
    assert ["Doubles." in step.prompt for step in steps.values()] == [True, False]
    empty = humaneval_explain.second_steps([one], [Sample("P/0", 0, "Doubles.")], True)
    assert empty["P/0", 0] == one.write("") and "Doubles" not in empty["P/0", 0].prompt


def test_chrf() -> None:
    pytest.importorskip("sacrebleu")
    name, same = humaneval_explain.chrf([("P/0", "Area of a circle", "Area of a circle"), ("P/1", "", "text")])
    assert same.value == pytest.approx(0.5) and re.fullmatch(r"chrF2 \(sacrebleu [\d.]+\)", name)
    _, other = humaneval_explain.chrf([("P/0", "zzz", "Area of a circle")])
    assert other.value == 0 and other.high > 0


def test_every_reference_is_taken_apart(shared_data: Path) -> None:
    for problem in humaneval.problems():
        one = humaneval_explain.take_apart(problem)
        assert not re.search(rf"\b{problem.entry}\b", one.code + one.problem.before), problem.task_id
        compile(one.code, problem.task_id, "exec")
