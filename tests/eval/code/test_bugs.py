"""Planted bugs: each operator does what it is called, right programs stay, only bugs that tests notice are kept."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.eval.code import bugs, kept
from jaxlm.eval.code.estimate import wilson
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.tasks import bug_detection, humaneval, humaneval_fix
from jaxlm.sandbox import HarnessError, Limits, Sandbox, Tests, Verdict, grade
from jaxlm.sandbox.choose import _key as choose_key

SOURCE = '''import math


def helper(x):
    return x + 1


def f(a, b=2):
    """Doc: 1 < 2 and True."""
    total = 0
    for n in a:
        if n < b and not n == 3:
            total += min(n, 5)
        if n > 9:
            break
        if not total:
            total -= 1
    return total % 7
'''


def made(operator: str) -> list[str]:
    """The lines that bugs of an operator change."""
    right = bugs.plain(SOURCE, "f").splitlines()
    found = [bug.program.splitlines() for bug in bugs.candidates(SOURCE, "f", "0") if bug.operator == operator]
    return sorted(
        new.strip() for lines in found for old, new in zip(right, lines, strict=False) if old != new
    )  # one line each


@pytest.mark.parametrize(
    ("operator", "line"),
    [
        ("comparison", "if n <= b and (not n == 3):"),
        ("arithmetic", "return total // 7"),
        ("boolean", "if n < b or not n == 3:"),
        ("condition", "if n <= 9:"),
        ("condition", "if total:"),
        ("constant", "total = 1"),
        ("variable", "return n % 7"),
        ("function", "total += max(n, 5)"),
        ("missing", "if n > 9:"),
    ],
)
def test_each_operator(operator: str, line: str) -> None:
    assert line in made(operator) and operator in bugs.OPERATORS


def test_a_bug_does_not_show_by_its_form() -> None:
    """No `pass` stands for what is left out, and no `not` before a whole condition turns it round."""
    right = ast.unparse(ast.parse(SOURCE))
    listed = bugs.candidates(SOURCE, "f", "0")
    assert all("pass" not in bug.program and "not (" not in bug.program.replace("(not n", "") for bug in listed)
    left_out = [bug.program for bug in listed if bug.operator == "missing"]
    assert len(left_out) == 3 and all(len(ast.parse(text).body) == 3 for text in left_out)
    assert {len(right.splitlines()) - len(text.splitlines()) for text in left_out} == {2}
    alone = "def f(a):\n    'Doc.'\n    if a.b and a:\n        a += 1\n    return a\n"
    assert [bug.operator for bug in bugs.candidates(alone, "f", "0")].count("missing") == 1  # the whole `if` only
    assert "condition" not in {bug.operator for bug in bugs.candidates(alone, "f", "0")}


def test_only_the_function_is_changed() -> None:
    listed = bugs.candidates(SOURCE, "f", "0")
    assert len(bugs.OPERATORS) == 8 and {bug.operator for bug in listed} == set(bugs.OPERATORS)
    right = bugs.plain(SOURCE, "f")
    head = right[: right.index("    total = 0")]
    assert all(bug.program.startswith(head) and bug.program != right for bug in listed)
    assert listed == bugs.candidates(SOURCE, "f", "0") != bugs.candidates(SOURCE, "f", "1")
    assert len({bug.program for bug in listed}) == len(listed) <= bugs.TRIES
    with pytest.raises(ValueError, match="defines no function g"):
        bugs.plain(SOURCE, "g")


ROW = {
    "prompt": "def least(a, b):\n    '''The smaller.'''\n",
    "entry_point": "least",
    "canonical_solution": "    if a < b:\n        return a\n    return b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 1\n    assert candidate(4, 3) == 3\n",
}

LIMITS = {"Own/0": Limits(cpu_seconds=7.0), "Own/1": Limits()}


def own(tmp_path: Path) -> list[Problem]:
    """A problem with a bug, and one whose tests are too weak for any."""
    weak = {"test": "def check(candidate):\n    candidate(1, 2)\n"}
    rows = [{**ROW, "task_id": "Own/0"}, {**ROW, **weak, "task_id": "Own/1"}]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return humaneval.problems(file)


def test_bugs_that_tests_notice_are_kept(tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    right = own(tmp_path)
    planted = bugs.plant(right, sandbox, LIMITS)
    assert list(planted) == ["Own/0"]
    assert not grade(planted["Own/0"].program, right[0].tests, Limits(), sandbox).passed
    # What was tried is remembered: no program is judged again.
    monkeypatch.setattr(bugs, "grade_many", lambda work, sandbox: iter(()) if not list(work) else 1 / 0)
    assert bugs.plant(right[:1], sandbox, LIMITS) == planted
    # A line that was cut short is no result, and spoils no other.
    file = tmp_path / "cache" / "jaxlm" / "sandbox" / "bugs.jsonl"
    file.write_text(f'["ab", 1{"x"}\n{file.read_text()}["cd"')
    assert bugs.plant(right[:1], sandbox, LIMITS) == planted

    (fix,) = humaneval_fix.problems(right, planted)
    assert planted["Own/0"].program in fix.prompt and fix.prompt.endswith(f"Answer:\n{ROW['prompt']}")
    assert planted["Own/0"].program in fix.question
    assert grade(fix.program(ROW["canonical_solution"]), fix.tests, Limits(), sandbox).passed
    asked = bug_detection.problems(right, planted)
    assert [one.task_id for one in asked] == ["Own/0/right", "Own/0/wrong"]
    assert [planted["Own/0"].program in one.prompt for one in asked] == [False, True]
    assert asked[0].prompt.endswith("Answer:") and bugs.plain(right[0].reference, "least") in asked[0].prompt


def test_each_bug_has_the_limits_of_its_reference(
    tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, set[float]] = {}

    def passes(work: Iterable[tuple[str, Tests, Limits]], sandbox: Sandbox) -> Iterator[Verdict]:
        for _, tests, limits in work:
            given.setdefault(tests.source, set()).add(limits.cpu_seconds)
            yield Verdict("passed", "", {}, sandbox.name)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bugs, "grade_many", passes)
    right = own(tmp_path)
    assert bugs.plant(right, sandbox, LIMITS) == {}
    assert [given[problem.tests.source] for problem in right] == [{7.0}, {3.0}]


def test_a_fault_of_the_judge_is_one_line(tmp_path: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work, sandbox):
        raise HarnessError("no box")
        yield

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bugs, "grade_many", fails)
    with pytest.raises(UserError, match="the judge failed, and no verdict was counted: no box"):
        bugs.plant(own(tmp_path), sandbox, LIMITS)


def test_what_is_kept_is_of_one_interpreter(tmp_path: Path, sandbox: Sandbox) -> None:
    """Another version of what judges, and nothing that was kept holds."""
    (problem, _) = own(tmp_path)
    other = Sandbox(dataclasses.replace(sandbox.backend, version=lambda: "2.0"), sandbox.interpreter)
    assert kept.key(problem, [], sandbox) == kept.key(problem, [], sandbox) != kept.key(problem, [], other)
    assert choose_key(sandbox.backend, sandbox.interpreter) != choose_key(other.backend, other.interpreter)


def test_without_bugs_there_is_no_task(tmp_path: Path) -> None:
    for task in (humaneval_fix, bug_detection):
        with pytest.raises(humaneval_fix.UserError, match="no bug could be planted"):
            task.problems(own(tmp_path), {})


@pytest.mark.parametrize(
    ("text", "flagged"),
    [(" yes", False), ("No.", True), ("Yes, no bug", False), ("nothing", None), ("", None), ("**NO**", True)],
)
def test_answers_in_words(text: str, flagged: bool | None) -> None:
    assert bug_detection.flag(text) is flagged


def test_scores_of_detection() -> None:
    """Worked out by hand: 2 of 3 faulty programs flagged, 1 right one flagged, one answer unclear."""
    flags = [("P/0/right", False), ("P/0/wrong", True), ("P/1/right", True), ("P/1/wrong", True),
             ("P/2/right", None), ("P/2/wrong", False)]  # fmt: skip
    scores = bug_detection.scores(flags)
    assert {name: round(one.value, 4) for name, one in scores.items()} == {
        "precision": 0.6667, "recall": 0.6667, "F1": 0.6667, "accuracy": 0.5,
    }  # fmt: skip
    assert all(one.low < one.value < one.high for one in scores.values())
    made = bug_detection.report(
        [bug_detection.Sample(name, 0, {True: "no", False: "yes"}.get(f, "?")) for name, f in flags], "", "monty"
    )
    assert made.scores == scores and made.counts == {"answered no": 3, "neither yes nor no": 1}
    record = made.to_json()
    assert (record["sandbox"], record["lower_bound"]) == ("monty", True) and "LOWER BOUNDS" in made.__rich__().title
    always = made.baselines["always wrong"]
    assert (always["recall"].value, always["accuracy"].value) == (1, 0.5) and always["F1"].value == pytest.approx(2 / 3)
    assert always["F1"][1:3] == pytest.approx(wilson(4, 6))  # six programs are flagged or wrong, not nine
    never = made.baselines["always right"]
    assert (never["precision"].value, never["precision"].high, never["recall"].value) == (0, 1, 0)
