"""The next line: which lines are asked, what counts as the answer, and figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.eval.tasks import next_line

TEXTS = [("a.py", "x = 1\ny = 2\n\ny = 2\nz = 3\n"), ("b.py", "only\n"), ("c.py", "\n\n  q\n")]


def test_lines() -> None:
    lines = {line.task_id: line for line in next_line.lines(TEXTS)}
    assert sorted(lines) == ["a.py:2", "a.py:4", "a.py:5", "c.py:3"]
    last = lines["a.py:5"]
    assert (last.prompt, last.wanted, last.guesses) == ("x = 1\ny = 2\n\ny = 2", "z = 3", ("y = 2", "y = 2"))
    assert lines["a.py:4"].guesses == ("", "x = 1") and lines["c.py:3"].prompt == "\n"
    few = next_line.lines(TEXTS, 2)
    assert len(few) == 2 and set(few) <= set(lines.values())
    assert next_line.lines([*TEXTS[1:], TEXTS[0]], 2) == few  # whatever the order of files
    with pytest.raises(UserError, match="no second line"):
        next_line.lines(TEXTS[1:2])


def test_long_files_are_seen_from_the_beginning_of_a_line() -> None:
    text = "\n".join(f"line {number} {'x' * 50}" for number in range(200))
    line = max(next_line.lines([("a", text)]), key=lambda one: int(one.task_id.split(":")[1]))
    assert next_line.CONTEXT - 70 < len(line.prompt) <= next_line.CONTEXT and line.prompt.startswith("line ")
    wide = next_line.lines([("a", "x" * 5000 + "\nend\n")])
    assert [len(one.prompt) for one in wide] == [next_line.CONTEXT]


@pytest.mark.parametrize(
    ("completion", "guess"),
    [("\n    return x\nmore", "    return x"), ("  \nz", "z"), (" + 1\nz", ""), ("z", ""), ("\n\nz", ""), ("", "")],
)
def test_the_line_of_a_completion(completion: str, guess: str) -> None:
    assert next_line.guess_of(completion) == guess


def test_figures_by_hand() -> None:
    pytest.importorskip("rapidfuzz")
    lines = [line for line in next_line.lines(TEXTS) if line.file == "a.py"]
    assert [line.wanted for line in lines] == ["y = 2", "y = 2", "z = 3"]
    scores = next_line.scores(lines, ["y = 2  ", "y = 9", ""])
    assert {name: round(one.value, 4) for name, one in scores.items()} == {
        "exact match": 0.3333, "prefix match": 0.6, "edit similarity": 0.6,
    }  # fmt: skip
    made = next_line.report(lines, ["\ny = 2", "\ny = 2", "\nz = 3"], "a.py")
    assert made.scores["exact match"].value == 1 and made.scores["exact match"].low < 1
    assert made.baselines["the most frequent line so far"]["exact match"].value == 0
    # "x = 1" for "y = 2", nothing for "y = 2", "y = 2" for "z = 3": 3 letters of 5 agree, none, 3.
    before = made.baselines["the line before"]
    assert before["prefix match"].value == 0 and before["edit similarity"].value == pytest.approx((0.6 + 0 + 0.6) / 3)
    assert made.to_json()["items"] == "lines of 1 files" and made.protocol.startswith("held out of a.py; greedy")
    assert "sandbox" not in made.to_json()


def test_files_to_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.py").write_text("x\ny\n")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\n\xff")
    assert next_line.texts_of(tmp_path) == [("deep/a.py", "x\ny\n")]
    assert next_line.texts_of(tmp_path / "deep" / "a.py") == [("a.py", "x\ny\n")]
    with pytest.raises(UserError, match="neither file nor folder"):
        next_line.texts_of(tmp_path / "c")
