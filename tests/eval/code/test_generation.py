"""Samples of a model: prompts, records that survive a kill, and the settings they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.eval.code import generation
from jaxlm.eval.code.evaluate import CodeOptions, problems_of
from jaxlm.eval.code.generation import Generation, make_samples, prompt_of
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.samples import Sample, from_answers
from jaxlm.sandbox import Tests

TESTS = Tests("assert candidate()", ("f",))
PROBLEMS = [Problem(f"P/{number}", f"prompt {number}", TESTS, "f", before="def f():\n") for number in range(13)]
GAP = replace(PROBLEMS[0], prompt="before\n", suffix="after\n")
FIM = {"fim_prefix": "<P>", "fim_middle": "<M>", "fim_suffix": "<S>"}


class Echo:
    """A model that answers with its prompt, its place in the batch and the seed."""

    def __init__(self, specials: dict[str, str] | None = None, ends_after: int = 1000) -> None:
        self.specials = specials or {}
        self.left = ends_after

    def complete(self, prompts: Sequence[str], seed: int) -> list[tuple[str, bool]]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return [(f" {prompt}|{place}|{seed}\n", place == 0) for place, prompt in enumerate(prompts)]

    def check(self, names: Mapping[str, str]) -> None:
        assert all(names)

    def turn(self, question: str) -> str:
        return f"<user>{question}<assistant>"

    def spelling(self, special: str) -> str | None:
        return self.specials.get(special)


def test_samples_go_on_after_a_kill(tmp_path: Path) -> None:
    how = Generation(samples=3, temperature=0.5, seed=7)
    samples = make_samples(PROBLEMS, Echo(), how, tmp_path / "whole")
    assert len(samples) == 39 and samples[4] == Sample("P/1", 1, f" prompt 1|4|{7 * 1_000_003}\n", False)
    assert sum(sample.cut_off for sample in samples) == 3
    data = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        make_samples(PROBLEMS, Echo(ends_after=2), how, tmp_path / "killed")
    file = tmp_path / "killed" / "samples.jsonl"
    for cut in (len(file.read_bytes()), len(data) // 3, 5):
        file.write_bytes(data[:cut])
        assert make_samples(PROBLEMS, Echo(), how, tmp_path / "killed") == samples and file.read_bytes() == data
    assert make_samples(PROBLEMS, Echo(ends_after=0), how, tmp_path / "killed") == samples
    settings = tmp_path / "killed" / "settings.json"
    settings.write_text(f" {settings.read_text()}")  # not written again: a full disk would leave none
    assert make_samples(PROBLEMS, Echo(ends_after=0), how, tmp_path / "killed") == samples
    assert settings.read_text().startswith(" ")
    with pytest.raises(UserError, match="has samples of other settings"):
        make_samples(PROBLEMS, Echo(), Generation(samples=3, temperature=0.6, seed=7), tmp_path / "killed")
    asked_otherwise = [replace(PROBLEMS[0], prompt="another prompt"), *PROBLEMS[1:]]
    for others in (PROBLEMS[::-1], asked_otherwise, PROBLEMS[:1]):
        with pytest.raises(UserError, match="has samples of other problems"):
            make_samples(others, Echo(), how, tmp_path / "killed")
    before = [{key: value for key, value in json.loads(line).items() if key != "prompt_digest"} for line in
              data.decode().splitlines()]  # fmt: skip
    file.write_text("".join(json.dumps(record) + "\n" for record in before))
    assert make_samples(PROBLEMS, Echo(ends_after=0), how, tmp_path / "killed") == samples  # kept before prompts were


def test_prompts_with_a_gap() -> None:
    model = Echo(FIM)
    assert prompt_of(PROBLEMS[0], model, Generation()) == "prompt 0"
    assert prompt_of(GAP, model, Generation()) == "<P>before\n<S>after\n<M>"
    assert prompt_of(GAP, model, Generation(fim="spm")) == "<P><S>after\n<M>before\n"
    assert prompt_of(GAP, Echo(), Generation(fim="prompt")) == "# The code ends with:\n# after\n\nbefore\n"
    with pytest.raises(UserError, match="infilling needs the tokens fim_prefix"):
        prompt_of(GAP, Echo(), Generation())
    with pytest.raises(UserError, match="no order of infilling 'pms'"):
        Generation(fim="pms")


def test_answers_of_a_chat_model() -> None:
    answer = "Sure:\n```python\ndef f():\n    return 1\n```"
    problems, samples = from_answers(PROBLEMS[:1], [Sample("P/0", 0, answer)])
    assert problems[0].program(samples[0].completion) == "def f():\n    return 1\n"
    with pytest.raises(UserError, match="--chat is for tasks that ask for a function"):
        from_answers([GAP], [])


def test_an_unknown_task() -> None:
    with pytest.raises(UserError, match=r"unknown task 'humanevl'.*did you mean 'humaneval'"):
        problems_of("humanevl", CodeOptions())
    assert generation.CHUNK > 1
