"""Samples of anybody, judged: verdicts, records that survive a kill, and one line for each mistake."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.eval.code import score
from jaxlm.eval.code.problems import find_file
from jaxlm.eval.code.samples import Sample, read_samples, records, write_whole
from jaxlm.eval.tasks import humaneval, humaneval_sh, infilling, mbpp
from jaxlm.sandbox import Sandbox
from tests.eval.code.bash_answers import ANSWERS

ROW = {
    "task_id": "Own/0",
    "prompt": "from math import floor\n\n\ndef down(x):\n    '''Round down.'''\n",
    "entry_point": "down",
    "canonical_solution": "    return floor(x)\n",
    "test": "def check(candidate):\n    assert candidate(2.5) == 2\n    assert candidate(-0.5) == -1\n",
}
RIGHT, WRONG = "    return floor(x)\n", "    return int(x)\n"
CHEAT = "    class Same:\n        def __eq__(self, other):\n            return True\n    return Same()\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    rows = [{**ROW, "task_id": f"Own/{number}"} for number in range(3)]
    file = tmp_path / "own.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return file


def samples_file(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judged(own: Path, samples: list[Sample], out: Path, sandbox: Sandbox, ks: tuple = (1,)) -> score.CodeReport:
    problems = {problem.task_id: problem for problem in humaneval.problems(own)}
    return score.judge_samples("own", problems, samples, out, sandbox, ks)


SAMPLES = [
    Sample("Own/0", 0, RIGHT),
    Sample("Own/0", 1, WRONG),
    Sample("Own/1", 0, CHEAT),
    Sample("Own/1", 1, RIGHT + "down(1"),
    Sample("Own/2", 0, "    return\ud800\n"),
    Sample("Own/2", 1, RIGHT + "print(" * 9, True),
]


def test_scores(own: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    report = judged(own, SAMPLES, tmp_path / "verdicts.jsonl", sandbox, (1, 2))
    assert (report.problems, report.samples, report.passed, report.cut_off) == (3, 6, 1, 1)
    assert report.verdicts == {"syntax": 3, "passed": 1, "failed": 1, "not_plain": 1}
    assert report.raw[1].value == pytest.approx(1 / 6) and report.raw[2].value == pytest.approx(1 / 3)
    assert report.sanitised[2].value == 1.0
    tree = report.to_json()
    assert (tree["task"], tree["n"], tree["sandbox"]) == ("own", 6, sandbox.name) and "isolated" not in tree
    lines = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert lines[1]["details"] == {
        "call": "down(-0.5)",
        "got": "0",
        "wanted": "-1",
        "assertion": "assert candidate(-0.5) == -1",
    }


def test_a_killed_evaluation_ends_with_the_same_file(own: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    judged(own, SAMPLES, whole, sandbox)
    data = whole.read_bytes()
    for cut in (0, 7, len(data) // 2, len(data)):
        killed.write_bytes(data[:cut])
        judged(own, SAMPLES, killed, sandbox)
        assert killed.read_bytes() == data
    with pytest.raises(UserError, match="records of other samples"):
        judged(own, SAMPLES[::-1], killed, sandbox)


def test_two_evaluations_of_one_file(tmp_path: Path) -> None:
    with (
        records(tmp_path / "x.jsonl"),
        pytest.raises(UserError, match="another evaluation writes"),
        records(tmp_path / "x.jsonl"),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=rf"x.jsonl cannot be locked: {os.strerror(number)} \(.*--out names"),
        records(tmp_path / "x.jsonl"),
    ):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    with records(tmp_path / "v.jsonl") as opened, open("/dev/full", "wb", buffering=0) as full:
        opened.file = full
        with pytest.raises(UserError, match=r"v.jsonl: No space left.*goes on from here"):
            opened.append({})


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "new" / "report.json"
    write_whole(file, "before\n")

    def full(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"report.json: No space left on device \(make room.*goes on from here"):
        write_whole(file, "after\n")
    assert file.read_text() == "before\n" and list(file.parent.iterdir()) == [file]


def test_a_file_of_others_stays_as_it_is(own: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    """`--out` names the samples themselves: no line of theirs is taken for one that a kill cut short."""
    file = tmp_path / "samples.jsonl"
    for text in ('{"task_id": "Own/0"}\n{"task_id": "Own/1"}', "[1]\n", "text\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"has records of other samples|is no file of records"):
            judged(own, SAMPLES, file, sandbox)
        assert file.read_text() == text
    for text in ("[]\n", '[["task_id", "Own/0"]]\n'):  # Python makes a dict of both
        file.write_text(text)
        with pytest.raises(UserError, match="is no file of records"), records(file):
            pass


def test_a_reference_that_fails_here(own: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    row = {**ROW, "canonical_solution": WRONG}
    file = tmp_path / "bad.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(UserError, match=r"the reference of Own/0 fails here: failed.*the task is out of order"):
        judged(file, SAMPLES[:1], tmp_path / "verdicts.jsonl", sandbox)
    file.write_bytes(gzip.compress(json.dumps({**ROW, "test": "def check(candidate): pass"}).encode()))
    with pytest.raises(UserError, match="the judge failed, and no verdict was counted: the tests never called"):
        judged(file, SAMPLES[:1], tmp_path / "verdicts.jsonl", sandbox)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task_id": "Own/9", "completion": ""}, r"line 1: unknown task_id 'Own/9' \(did you mean"),
        ({"task_id": "Own/0"}, "no key 'completion'"),
        ({"task_id": "Own/0", "completion": 3}, "the completion is no text but int"),
        ([], "no key 'task_id'"),
        ({"task_id": "Own/0", "completion": "x" * (1 << 21)}, "a completion of 2,097,152 characters"),
    ],
)
def test_bad_samples(row: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_samples(samples_file(tmp_path / "samples.jsonl", [row]), ["Own/0"])


def test_more_bad_samples(tmp_path: Path) -> None:
    twice = {"task_id": "Own/0", "completion": "", "sample": 0}
    with pytest.raises(UserError, match="sample 0 of Own/0 is there twice"):
        read_samples(samples_file(tmp_path / "samples.jsonl", [twice, twice]), ["Own/0"])
    with pytest.raises(UserError, match="has no sample"):
        read_samples(samples_file(tmp_path / "samples.jsonl", []), ["Own/0"])
    with pytest.raises(UserError, match="is no file"):
        read_samples(tmp_path / "nothing.jsonl", [])
    for text in ("no json\n", "[" * 100_000, '{"task_id": ' + "1" * 5_000, "\ud800"):
        (tmp_path / "text.jsonl").write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(UserError, match=r"line 1: .*one row a line"):
            read_samples(tmp_path / "text.jsonl", [])
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:10] + b"\xff" * 9)
    with pytest.raises(UserError, match=r"broken.jsonl.gz, line 1: .*one row a line"):
        read_samples(tmp_path / "broken.jsonl.gz", [])


def test_too_few_samples(own: Path, tmp_path: Path, sandbox: Sandbox) -> None:
    with pytest.raises(UserError, match="pass@2 needs 2 samples of each problem, Own/2 has 1"):
        judged(own, SAMPLES[:5], tmp_path / "verdicts.jsonl", sandbox, (2,))


def test_where_sets_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXLM_DATA")
    with pytest.raises(UserError, match="JAXLM_DATA is not set"):
        find_file(None, "humaneval/HumanEval.jsonl.gz")
    monkeypatch.setenv("JAXLM_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"HumanEval.jsonl.gz is missing"):
        humaneval.problems()
    with pytest.raises(UserError, match="--data names the file"):
        find_file(tmp_path / "x.jsonl")
    del (row := dict(ROW))["entry_point"]
    with pytest.raises(UserError, match="line 1: no key 'entry_point'"):
        humaneval.problems(samples_file(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(UserError, match="line 1: 'prompt' is int and not str"):
        humaneval.problems(samples_file(tmp_path / "bad.jsonl", [{**ROW, "prompt": 3}]))
    told = "line 1: 'test_list' is list of int and not list of str"
    row = {"task_id": 11, "text": "", "code": "", "test_setup_code": "", "test_list": [3]}
    with pytest.raises(UserError, match=told):
        mbpp.problems(samples_file(tmp_path / "bad.jsonl", [row]))
    row = {**row, "test_list": [], "challenge_test_list": 7}
    with pytest.raises(UserError, match="line 1: 'challenge_test_list' is int and not list"):
        mbpp.problems(samples_file(tmp_path / "bad.jsonl", [row]))
    row = {"name": "x", "prompt": "", "tests": '}\n\ncandidate() {\n f "$@"\n}\n', "stop_tokens": ["\n}", None]}
    with pytest.raises(UserError, match="line 1: 'stop_tokens' is list of NoneType and not list of str"):
        humaneval_sh.problems(samples_file(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(UserError, match="no infilling set 'one-line'"):
        infilling.problems(part="one-line")


def test_a_few_references_of_each_set(shared_data: Path, sandbox: Sandbox) -> None:
    """The whole sets are in the soak test."""
    listed = {
        "humaneval": [
            problem for problem in humaneval.problems() if problem.task_id in {"HumanEval/32", "HumanEval/38"}
        ],
        "mbpp": [
            problem for problem in mbpp.problems(every=True) if problem.task_id in {"367", "533", "596", "653", "888"}
        ],
        "infilling": infilling.problems(part="random-span-light")[:2],
    }
    for name, problems in listed.items():
        assert problems and len(score.reference_times(problems, sandbox)) == len(problems), name


@pytest.mark.soak
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "single-line", "multi-line", "random-span", "random-span-light"])
def test_all_references(name: str, shared_data: Path, sandbox: Sandbox) -> None:
    listed = {"humaneval": humaneval.problems, "mbpp": lambda: mbpp.problems(every=True)}
    problems = listed[name]() if name in listed else infilling.problems(part=name)
    assert len(score.reference_times(problems, sandbox)) == len(problems)


def test_prompts_of_mbpp(shared_data: Path) -> None:
    problems = mbpp.problems()
    assert [len(problems), problems[0].task_id, problems[-1].task_id] == [500, "11", "510"]
    assert problems[0].prompt.count("[BEGIN]\n") == 4 == problems[0].prompt.count("[DONE]\n") + 1
    assert problems[0].prompt.endswith("[BEGIN]\n") and "\r" not in problems[0].prompt
    assert mbpp.problems(shots=0)[0].prompt.count("[BEGIN]") == 1 and len(mbpp.problems(every=True)) == 974


def test_bash_problems(shared_data: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    problems = {problem.task_id: problem for problem in humaneval_sh.problems()}
    assert len(problems) == 158
    task_id = "HumanEval_23_strlen"
    texts = [
        '    echo "${#1}"\n}\nstrlen abc',
        '    echo "${#1}"',
        ":",
        'echo "$1"',
        "}\nexit 0\n{",
        "exit 0",
        "    echo 3",
    ]
    samples = [Sample(task_id, number, text) for number, text in enumerate(texts)]
    report = score.judge_samples("humaneval-sh", problems, samples, tmp_path / "v.jsonl", sandbox)
    kinds = [json.loads(line)["raw"] for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert kinds == ["passed", "passed", *["failed"] * 5] and report.passed == 2


def test_forty_answers_in_bash(shared_data: Path, sandbox: Sandbox) -> None:
    from jaxlm.sandbox import Limits, grade_many

    problems = {problem.task_id: problem for problem in humaneval_sh.problems()}
    pairs = [(problems[task_id], text) for task_id, both in ANSWERS.items() for text in both]
    work = ((problem.program(text), problem.tests, Limits(cpu_seconds=10.0)) for problem, text in pairs)
    assert [verdict.passed for verdict in grade_many(work, sandbox)] == [True, False] * 20
