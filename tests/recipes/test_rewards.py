"""Rewards by hand, wrong answers that try to be counted, and graders that raise, hang, die or eat memory."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.infer.scores import Scorer
from jaxlm.recipes.rollouts import graders, rewards
from jaxlm.recipes.rollouts.graders import Grade, GraderPool, Sample
from jaxlm.recipes.rollouts.rewards import REWARDS, find_rewards
from jaxlm.sandbox import choose
from tests.test_front_door import CFG, make


def has_sandbox() -> bool:
    try:
        choose()
    except UserError:
        return False
    return True


def score(spec: str, completion: str, **row: object) -> float | None:
    (reward,) = find_rewards([spec])
    return reward("prompt", completion, {"answer": "72", "tokens": 10} | row)


@pytest.mark.parametrize(
    "text",
    [
        "72",
        "so it is\n72",
        "#### 72",
        "#### 72.0",
        r"thus \boxed{72}.",
        "The answer is 72.",
        "the answer is: $72",
        "+72",
    ],
)
def test_a_stated_answer_counts(text: str) -> None:
    assert score("exact_number", text) == 1


@pytest.mark.parametrize(
    "text",
    [
        "10 or 72",
        "71, 72, 73",
        "it may be 72 or not, who knows",
        "#### 71\n#### 72",
        r"\boxed{71} or \boxed{72}",
        r"\boxed{1}, #### 72",
        "The answer is 72, or 10.",
        "72 apples or 10 pears",
        "-72",
        "7 2",
        "",
        "####",
    ],
)
def test_what_only_looks_like_an_answer_does_not(text: str) -> None:
    """Trap 32."""
    assert score("exact_number", text) == 0


@pytest.mark.parametrize(
    ("text", "answer"), [("1,234", 1234), ("3/4", 0.75), ("-0.5", "-1/2"), ("50%", "50"), ("$1,000.50", 1000.5)]
)
def test_forms_of_numbers(text: str, answer: object) -> None:
    assert score("exact_number", text, answer=answer) == 1


def test_numbers_that_are_none() -> None:
    assert score("exact_number", "5", answer="no number") is None
    assert score("exact_number", "1/0", answer=0) == 0
    assert score("exact_number", "1,23", answer=123) == 0


def test_the_others_by_hand() -> None:
    assert score("exact_text", " 72 ") == 1 and score("exact_text", "720") == 0
    assert (
        score("right_letters", "7299") == 0.5 and score("right_letters", "7") == 0.5 and score("right_letters", "") == 0
    )
    assert score(r"matches(pattern='<a>.*</a>')", "<a>\n1</a>") == 1 and score(r"matches(pattern='<a>')", "<a>1") == 0
    assert score("json_keys(keys=['a'])", '{"a": 1}') == 1 and score("json_keys(keys=['a'])", '{"b": 1}') == 0
    assert score("json_keys", "[1") == 0
    assert score("length(per_token=-0.5)", "") == -5
    assert [score("overlong(longest=12, buffer=4)", "", tokens=n) for n in (8, 10, 12, 13)] == [0, -0.5, -1, -1]
    assert score("repetition", "a b c a b c a b c") == pytest.approx(3 / 7 - 1) and score("repetition", "a b") == 0


@pytest.mark.skipif(not has_sandbox(), reason="nothing isolates code here: `jaxlm sandbox` says why")
def test_unit_tests_judge_a_program_in_the_sandbox(tmp_path: Path) -> None:
    """An answer in fences, a bare body behind its prompt, a wrong one, one that equals everything, one that escapes."""
    escaped = tmp_path / "escaped"
    row = {"entry_point": "double", "tests": ["assert double(2) == 4", "assert candidate('a') == 'aa'"], "answer": ""}
    equal = "class All:\n    def __eq__(self, other): return True\ndef double(x): return All()"
    answers = {
        "Here it is:\n```python\ndef double(x):\n    return x * 2\n```\nDone.": 1,
        "def double(x): return x + 2": 0,
        equal: 0,
        f"def double(x):\n    open({str(escaped)!r}, 'w')\n    return x * 2": 0,
        "no code at all": 0,
    }
    samples = [Sample("Write double.", answer, row) for answer in answers]
    samples.append(Sample("def double(x):\n", "    return 2 * x\n", row))
    with GraderPool(find_rewards(["unit_tests(cpu_seconds=3)"]), workers=1, limit_s=60.0) as pool:
        grades = [grade for (grade,) in pool.grade(samples)]
    assert grades == [*(Grade(float(value)) for value in answers.values()), Grade(1.0)]
    assert not escaped.exists()


def test_a_verifier_says_how_probable_it_is_that_an_answer_is_right(tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, head="verifier")
    model = make(cfg)
    model.save(tmp_path / "verifier", "torch")
    (reward,) = find_rewards([f"reward_model(path={str(tmp_path / 'verifier')!r})"])
    scorer = Scorer.open(tmp_path / "verifier")
    ids = scorer._ids("1 + 1 = ", "2")
    (logit,) = np.asarray(model(ids))[-1]
    assert reward("1 + 1 = ", "2", {}) == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-12)
    make().save(tmp_path / "words", "torch")
    with pytest.raises(UserError, match=r"model.head = 'lm' is no reward model"):
        find_rewards([f"reward_model(path={str(tmp_path / 'words')!r})"])


def test_weights_and_mistakes() -> None:
    first, second = find_rewards(["exact_number", "overlong(longest=64, buffer=16) * -0.5"])
    assert (first.weight, second.weight, second.options) == (1, -0.5, {"longest": 64, "buffer": 16})
    for specs, message in [
        ([], "nothing says what is good"),
        (["exact_numbr"], "no reward 'exact_numbr'"),
        (["overlong(size=3)"], "has no option 'size'"),
        (["overlong(longest=)"], "is no reward"),
        (["length * 1.2.3"], "is no reward"),
        (["reward_model"], "the reward reward_model has no path"),
        (["no_such_module:f"], "No module named 'no_such_module'"),
        (["json:no_such"], "json has no function 'no_such'"),
    ]:
        with pytest.raises(UserError, match=message):
            find_rewards(specs)
    assert set(REWARDS) >= {"exact_number", "matches", "overlong"}


OWN = """
import os, time
def kind(prompt, completion, row):
    if completion == "raise": return 1 / 0
    if completion == "hang": time.sleep(60)
    if completion == "die": os._exit(3)
    if completion == "memory": return len(bytearray(1 << 40))
    if completion == "print": print("a print is no answer")
    return {"good": 0.5, "nan": float("nan"), "text": "one", "none": None, "true": True, "print": 2}[completion]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_reward:kind"


def test_broken_graders_cost_their_sample_and_nothing_else(own: str) -> None:
    """Trap 26."""
    answers = ["good"] * 30 + ["raise", "hang", "die", "memory", "none", "nan", "print", "true"]
    samples = [Sample("p", answer, {"tokens": 1}) for answer in answers]
    with GraderPool(find_rewards([own, "length"]), workers=2, limit_s=5.0) as pool:
        grades = pool.grade(samples)
        again = pool.grade(samples[:3])
    assert [row[0] for row in grades[:30]] == [Grade(0.5)] * 30 and [row[0] for row in again] == [Grade(0.5)] * 3
    values, reasons = zip(*(row[0] for row in grades[30:]), strict=True)
    assert values == (None, None, None, None, None, None, 2, 1)
    wanted = ("ZeroDivisionError", "no answer within 5 s", "died (exit code 3)", "MemoryError", "None", "nan", "", "")
    assert all(part in reason for part, reason in zip(wanted, reasons, strict=True))
    assert all(row[1].value == 0.01 for row in grades)


def test_graders_that_always_fail_stop_the_run(own: str) -> None:
    with (
        GraderPool(find_rewards([own]), limit_s=5.0) as pool,
        pytest.raises(UserError, match="for 2 of 4 samples: it returned str"),
    ):
        pool.grade([Sample("p", answer, {}) for answer in ("good", "text", "text", "good")])


def test_no_worker_is_left(own: str) -> None:
    with GraderPool(find_rewards([own]), limit_s=5.0) as pool:
        pool.grade([Sample("p", "good", {})])
        pids = [worker.process.pid for worker in pool.idle]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    started = time.monotonic()
    with GraderPool(find_rewards(["exact_text"])) as pool:
        pool.grade([Sample("p", "1", {"answer": "1"})] * 100)
        assert not pool.idle
    assert time.monotonic() - started < 1


def test_many_answers_are_judged_at_once_and_one_by_one_if_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def lengths(answers: list[tuple[str, str]], *, most: int = 9) -> list[float]:
        calls.append(len(answers))
        if any(len(answer) > most for _, answer in answers):
            raise ValueError("too long")
        return [float("nan") if answer == "nan" else float(len(prompt) + len(answer)) for prompt, answer in answers]

    monkeypatch.setitem(rewards.TOGETHER, "length_at_once", lengths)
    monkeypatch.setitem(REWARDS, "length_at_once", lambda prompt, answer, row: lengths([(prompt, answer)])[0])
    monkeypatch.setattr(graders, "QUICK", {"length_at_once"})
    samples = [Sample("p", answer, {}) for answer in ("a", "bcd", "efgh", *"stuvwx", "nan")]
    with GraderPool(find_rewards(["length_at_once"])) as pool:
        graded = [grade for (grade,) in pool.grade(samples)]
        assert calls == [10] and [grade.value for grade in graded] == [2, 4, 5, *[2] * 6, None]
        assert graded[-1].reason == "it returned nan"
        graded = [grade for (grade,) in pool.grade([*samples, Sample("p", "much too long", {})])]
        assert calls[1:] == [11, *[1] * 11] and graded[1].value == 4
        assert graded[-1] == Grade(None, "ValueError: too long")
