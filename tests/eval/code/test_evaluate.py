"""Tasks from end to end with a tiny random model: records, resume, baselines, and one line for each mistake."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.cli.evaluate import CODE_TASKS
from jaxlm.config import toml
from jaxlm.convert.files.storage import planned, write_folder
from jaxlm.convert.native import to_torch
from jaxlm.errors import UserError
from jaxlm.eval.code import evaluate
from jaxlm.eval.code.evaluate import CodeOptions, judge_file, measure
from jaxlm.eval.code.generation import Generation
from jaxlm.eval.code.metrics import MetricReport
from jaxlm.eval.code.score import CodeReport
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.sandbox import Sandbox, choose
from jaxlm.sandbox.choose import BACKENDS
from jaxlm.text.tokenizer import Tokenizer

ROW = {
    "prompt": 'def least(a, b):\n    """The smaller of two numbers."""\n',
    "entry_point": "least",
    "canonical_solution": "    if a < b:\n        return a\n    return b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 1\n    assert candidate(4, 3) == 3\n",
}
RIGHT = ROW["canonical_solution"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and the tokens of a chat, its corpus beside it."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "corpus").mkdir()
    for number in range(12):
        (path / "corpus" / f"{number}.py").write_text(f"x = {number}\ny = x\n\nz = {number}\n")
    tokenizer = Tokenizer.bytes_level()
    sizes = {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 1024, "init_std": 0.3}
    settings = config.Config(
        model=config.Model(vocab_size=tokenizer.vocab_size, **sizes),
        data=config.Data(
            source=str(path / "corpus"), cache_dir=str(path / "cache"), seq_len=64, validation_fraction=0.3
        ),
    )
    params = jax.tree.map(np.asarray, init_params(Decoder(settings.model), jax.random.key(0)))
    files = {"config.toml": toml.to_toml(settings), "tokenizer.json": tokenizer.to_json()}
    write_folder(path / "model", planned(to_torch(params, settings.model)), files, layout="torch")
    return path / "model"


@pytest.fixture
def options(tmp_path: Path) -> CodeOptions:
    rows = [{**ROW, "task_id": f"Own/{number}"} for number in range(3)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CodeOptions(data=file, limit=2, out=tmp_path / "out", generation=Generation(max_new_tokens=8))


def test_the_tasks_of_the_command_line() -> None:
    assert CODE_TASKS == evaluate.TASKS


def test_programs_by_question(model: Path, options: CodeOptions, tmp_path: Path, sandbox: Sandbox) -> None:
    """A random model passes nothing; a second call judges nothing anew and ends with the same files."""
    made = measure(model, ["humaneval-fix", "humaneval-explain", "bug-detection"], options)
    fix, explain, detection = made
    assert isinstance(fix, CodeReport) and (fix.problems, fix.passed, fix.raw[1].value) == (2, 0, 0)
    assert isinstance(explain, CodeReport) and explain.passed == 0 and explain.cut_off == 2
    names = list(explain.beside)
    assert names[0] == "pass@1 without an explanation" and names[1].startswith("chrF2 (sacrebleu")
    assert explain.beside["chrF2 of the docstring of another problem"].value == 1  # the rows are alike
    assert isinstance(detection, MetricReport) and detection.n == 4 and list(detection.baselines) == [
        "always wrong", "always right",
    ]  # fmt: skip
    files = {file: file.read_bytes() for file in sorted((tmp_path / "out").rglob("*.jsonl"))}
    assert {str(file.relative_to(tmp_path / "out")) for file in files} == {
        "humaneval-fix/samples.jsonl", "humaneval-fix/verdicts.jsonl", "bug-detection/samples.jsonl",
        "humaneval-explain/explanations/samples.jsonl", "humaneval-explain/samples.jsonl",
        "humaneval-explain/verdicts.jsonl", "humaneval-explain/unexplained/samples.jsonl",
        "humaneval-explain/unexplained/verdicts.jsonl",
    }  # fmt: skip
    for file, data in files.items():
        file.write_bytes(data[: len(data) * 2 // 3])
    again = measure(model, ["humaneval-fix", "humaneval-explain", "bug-detection"], options)
    assert [one.to_json() for one in again] == [one.to_json() for one in made]
    assert {file: file.read_bytes() for file in files} == files
    assert json.loads((tmp_path / "out" / "bug-detection.json").read_text())["scores"]["F1"]["high"] <= 1
    with pytest.raises(UserError, match="has answers on other programs"):
        measure(model, ["bug-detection"], replace(options, limit=1))
    answers = tmp_path / "out" / "bug-detection" / "samples.jsonl"
    first, _, rest = answers.read_text().partition("\n")  # the same task, asked of another program
    answers.write_text(json.dumps({**json.loads(first), "prompt_digest": "0123456789abcdef"}) + "\n" + rest)
    with pytest.raises(UserError, match="has answers on other programs"):
        measure(model, ["bug-detection"], options)


def test_next_lines_of_the_run(model: Path, options: CodeOptions, tmp_path: Path) -> None:
    """Lines come from held-out files only, greedily, without any sandbox."""
    options = replace(options, data=None, limit=0)
    (made,) = measure(model, ["next-line"], options)
    assert isinstance(made, MetricReport) and made.n == 2 * int(made.items.split()[2]) > 0
    held_out = {line["task_id"].split(":")[0] for line in lines(tmp_path / "out/next-line/samples.jsonl")}
    assert 0 < len(held_out) < 12 and made.scores["exact match"].value == 0
    assert set(made.baselines) == {"the line before", "the most frequent line so far"}
    assert made.protocol.startswith(f"held out of {model.parent / 'corpus'}; ")


class OfRun(evaluate.ModelCompleter):
    """What the choice of text asks of a model: its config, and whether it is a run."""

    def __init__(self, settings: config.Config, kind: str = "run", path: Path | None = None) -> None:
        self.model = self
        self.config, self.kind, self.path = settings, kind, path


def test_the_text_of_next_lines_is_the_runs_own(tmp_path: Path) -> None:
    """Of a mixture, all its corpora, each file once by name; a run without a corpus asks for one."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(12):
            (tmp_path / name / f"{number}.py").write_text(f"{name} = {number}\n")
    parts = tuple(config.MixtureSource(name=name, source=str(tmp_path / name)) for name in ("one", "two"))
    mixed = config.Config(data=config.Data(mixture=parts, validation_fraction=0.5))
    where, texts = evaluate._texts(OfRun(mixed), CodeOptions())
    assert where == f"{tmp_path / 'one'}; {tmp_path / 'two'}"
    found = dict(texts)
    assert {name.split("/")[0] for name in found} == {"one", "two"}
    assert all(text.startswith(name.split("/")[0]) for name, text in found.items()) and 4 <= len(found) <= 20
    own = CodeOptions(data=tmp_path / "one")
    for cfg, kind, message in ((config.Config(recipe="sft"), "run", "the recipe sft reads no corpus"),
                               (config.Config(), "llama", "a model of llama comes without its corpus")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate._texts(OfRun(cfg, kind), CodeOptions())
        assert evaluate._texts(OfRun(cfg, kind), own)[0] == str(tmp_path / "one")


def test_the_default_corpus_of_a_folder_without_training_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A converted folder says nothing of its text, so its config has the default: the standard library."""
    evaluate._texts(OfRun(config.Config(), path=tmp_path), CodeOptions())
    (line,) = caplog.messages
    assert line.startswith(f"warning: {tmp_path} has no record of a training") and "--data" in line
    (tmp_path / "metrics.jsonl").touch()
    evaluate._texts(OfRun(config.Config(), path=tmp_path), CodeOptions())
    elsewhere = config.Config(data=config.Data(source=str(tmp_path)))
    evaluate._texts(OfRun(elsewhere, path=tmp_path / "other"), CodeOptions())
    assert len(caplog.messages) == 1


def test_what_cannot_be_measured_is_refused_first(
    options: CodeOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the sandbox is chosen or the model opened, whatever tasks come before it."""
    monkeypatch.setattr(evaluate, "choose", None)
    both = ["humaneval", "next-line"]
    for how in (Generation(temperature=0.5), Generation(chat=True)):
        with pytest.raises(UserError, match="next-line is greedy"):
            measure("no/run", both, replace(options, generation=how))
    for task, package in (("next-line", "rapidfuzz"), ("humaneval-explain", "sacrebleu")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"{task} needs {package} .*jaxlm\[eval\]"):
            measure("no/run", ["humaneval", task], options)
        row = {"task_id": "Own/0", "completion": "", "explanation": "Says nothing."}
        with pytest.raises(UserError, match=f"{task} needs {package}"):
            judge_file(task, samples_file(tmp_path / "some.jsonl", [row]), options)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def samples_file(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_of_anybody(options: CodeOptions, tmp_path: Path, sandbox: Sandbox) -> None:
    """Without a model: programs, explanations with them, answers in words, lines."""
    options = replace(options, out=None)
    both = [{"task_id": "Own/0", "completion": RIGHT}, {"task_id": "Own/1", "completion": "    return b\n"}]
    file = samples_file(tmp_path / "programs.jsonl", both)
    assert judge_file("humaneval-fix", file, options).raw[1].value == 0.5
    explained = [{**row, "explanation": "The smaller of two numbers."} for row in both]
    made = judge_file("humaneval-explain", samples_file(tmp_path / "explained.jsonl", explained), options)
    assert isinstance(made, CodeReport) and made.raw[1].value == 0.5
    assert [one.value for name, one in made.beside.items() if name.startswith("chrF2 (")] == [1]
    words = [{"task_id": f"Own/{n}/{side}", "completion": f"{word}."} for n in (0, 1)
             for side, word in (("right", "Yes"), ("wrong", "No"))]  # fmt: skip
    detected = judge_file("bug-detection", samples_file(tmp_path / "words.jsonl", words), options)
    assert isinstance(detected, MetricReport) and detected.scores["F1"].value == 1
    assert detected.sandbox == sandbox.name
    with pytest.raises(UserError, match=r"few\.jsonl has no answer on Own/0/wrong"):
        judge_file("bug-detection", samples_file(tmp_path / "few.jsonl", [words[0], *words[2:]]), options)
    text = tmp_path / "text.py"
    text.write_text("a\nb\nb\n")
    guesses = [{"task_id": f"text.py:{number}", "completion": "\nb\nmore"} for number in (2, 3)]
    file = samples_file(tmp_path / "lines.jsonl", guesses)
    following = judge_file("next-line", file, replace(options, data=text, limit=0))
    assert isinstance(following, MetricReport)
    assert following.scores["exact match"].value == 1
    assert following.baselines["the line before"]["exact match"].value == 0.5
    with pytest.raises(UserError, match=r"has no completion of text\.py:2"):
        judge_file("next-line", samples_file(file, guesses[1:]), replace(options, data=text, limit=0))
    with pytest.raises(UserError, match="--from knows no corpus"):
        judge_file("next-line", file, replace(options, data=None))
    with pytest.raises(UserError, match="next-line asks no question"):
        judge_file("next-line", file, replace(options, data=text, limit=0, chat=True))
    with pytest.raises(UserError, match=r"line 1: unknown task_id 'Own/0' .did you mean 'Own/0/"):
        judge_file("bug-detection", tmp_path / "programs.jsonl", options)


def test_a_chat_asks_by_the_template(model: Path, options: CodeOptions) -> None:
    how = Generation(chat=True, max_new_tokens=4)
    completer = evaluate.ModelCompleter(model, how)
    turn = completer.turn("Why?")
    assert "Why?" in turn and turn != "Why?"
    (problem, _) = evaluate.problems_of("humaneval", options)
    assert evaluate.generation.prompt_of(problem, completer, how) == completer.turn(problem.question)
    assert "least" in problem.question
    assert completer.choose("x", [" a", " b"]) + completer.choose("x", [" b", " a"]) == 1
    with pytest.raises(UserError, match="--chat: Own/0 asks no question"):
        evaluate.generation.prompt_of(replace(problem, question=""), completer, how)


def test_a_prompt_longer_than_the_model(model: Path, options: CodeOptions) -> None:
    """Refused before anything is generated, with the name of its problem; nothing is written."""
    completer = evaluate.ModelCompleter(model, Generation(max_new_tokens=1000))
    completer.check({"x" * 20: "short"})
    cfg = completer.model.config
    learned = replace(cfg, model=replace(cfg.model, positions="learned"))
    completer.model = replace(completer.model, config=learned)
    completer.check({"x" * 20: "short"})
    problems = evaluate.problems_of("humaneval", options)
    with pytest.raises(UserError, match=r"Own/\d: a prompt of \d+ and 1000 new tokens exceed .*at most \d+ new tokens"):
        evaluate.make_samples(problems, completer, completer.how, options.out or Path())
    assert options.out and not options.out.exists()
    prompts = {(one.task_id, number): "x" * (1 if number else 2000) for one in problems for number in range(2)}
    both = replace(completer.how, samples=2, temperature=0.5)
    with pytest.raises(UserError, match=r"Own/\d: a prompt of \d+ and 1000 new tokens exceed"):
        evaluate.make_samples(problems, completer, both, options.out, prompts=prompts)


def test_a_set_without_problems(options: CodeOptions, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"none.jsonl has no problem"):
        evaluate.problems_of("humaneval", replace(options, data=tmp_path / "none.jsonl"))


def test_lower_bounds_say_so(options: CodeOptions, tmp_path: Path) -> None:
    """A reference that fails in an interpreter which is not all of Python counts as a failure, and stops nothing."""
    if reason := BACKENDS["monty"].problem():
        pytest.skip(f"monty: {reason}")
    unknown = {
        **ROW,
        "task_id": "Own/3",
        "canonical_solution": "    import heapq\n    return heapq.nsmallest(1, [a, b])[0]\n",
    }
    assert options.data is not None
    options.data.write_text(options.data.read_text() + json.dumps(unknown) + "\n")
    rows = [
        {"task_id": "Own/0", "completion": RIGHT},
        {"task_id": "Own/3", "completion": unknown["canonical_solution"]},
    ]
    file = samples_file(tmp_path / "programs.jsonl", rows)
    made = judge_file("humaneval", file, replace(options, out=None, limit=0, sandbox="monty"))
    assert isinstance(made, CodeReport) and (made.sandbox, made.passed) == ("monty", 1)
    assert made.to_json()["lower_bound"] is True
    # The reference of Own/3 fails there without any bug, so it has no faulty program either.
    made = evaluate.built(
        "bug-detection", evaluate.problems_of("humaneval", replace(options, limit=0)), choose("monty")
    )
    assert {one.task_id.split("/")[1] for one in made} == {"0", "1", "2"}
    with pytest.raises(UserError, match="the sandbox monty runs no bash"):
        bash = {"name": "x", "prompt": "", "tests": '}\n\ncandidate() {\n    x "$@"\n}\n', "stop_tokens": []}
        own = samples_file(tmp_path / "bash.jsonl", [bash])
        judge_file("humaneval-sh", file, replace(options, data=own, sandbox="monty"))


def test_a_limit_is_a_number_of_problems() -> None:
    with pytest.raises(UserError, match="--limit -1 takes nothing"):
        CodeOptions(limit=-1)
