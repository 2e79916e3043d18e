"""A line of a file of prompts: options of the wrong name or type are told by name, with what was written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.infer.batch import answer_file, request_of
from jaxlm.infer.engine import Engine, Grammar, Request
from jaxlm.text.sampling import Sampling, preset

USUAL = Request((), sampling=Sampling(temperature=0.5, top_k=3), max_new_tokens=9)


def test_a_line_has_the_options_of_a_request() -> None:
    assert request_of({"prompt": "x"}, USUAL) == Request("x", sampling=USUAL.sampling, max_new_tokens=9)
    line = {"prompt": [1, 2], "stop": "a", "logit_bias": {"7": 1}, "deadline": 2, "sampling": {"temperature": 1}}
    wanted: dict[str, Any] = {"stop": ("a",), "logit_bias": {7: 1.0}, "deadline": 2.0, "max_new_tokens": 9}
    assert request_of(line, USUAL) == Request([1, 2], sampling=Sampling(temperature=1.0, top_k=3), **wanted)
    assert request_of({"prompt": "x", "sampling": "fim"}, USUAL).sampling == preset("fim")
    schema = {"prompt": "x", "grammar": {"json_schema": {"type": "null"}}}
    assert request_of(schema, USUAL).grammar == Grammar(json_schema='{"type": "null"}')
    assert request_of({"prompt": "x", "max_new_tokens": None, "grammar": None}, USUAL).max_new_tokens is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({}, "there is no prompt"),
        ({"prompt": 5}, "prompt = 5: input should be a valid string"),
        ({"prompt": "x", "max_tokens": 5}, r"unknown option 'max_tokens' \(did you mean 'max_new_tokens'\?\)"),
        ({"prompt": "x", "max_new_tokens": "5"}, 'max_new_tokens = "5": input should be a valid integer'),
        ({"prompt": "x", "n": True}, "n = true: input should be a valid integer"),
        ({"prompt": "x", "stop": 3}, "stop = 3: "),
        ({"prompt": "x", "sampling": {"temprature": 1}}, r"unknown option 'temprature' \(did you mean 'temperature'"),
        ({"prompt": "x", "sampling": {"top_p": "0.9"}}, 'top_p = "0.9": input should be a valid number'),
        ({"prompt": "x", "sampling": {"presence_penalty": float("nan")}}, "presence_penalty = nan must be"),
        ({"prompt": "x", "sampling": "hot"}, "hot"),
        ({"prompt": "x", "grammar": {"regex": "a", "lark": "b"}}, "regex and lark given"),
        ({"prompt": "x", "grammar": "yes"}, 'grammar = "yes": '),
        ({"prompt": "x", "logit_bias": {"a": 1}}, 'logit_bias = {"a": 1}: input should be a valid integer'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(line: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_of(line, USUAL)


def test_half_a_surrogate_is_told_in_its_line(tmp_path: Path) -> None:
    """JSON may hold one, UTF-8 cannot: the file of answers has it as JSON writes it."""
    lines = ['{"prompt": "\\ud800"}', '{"prompt": "x", "see\\udc00d": 1}', '{"prompt": 5}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    engine: Any = object.__new__(Engine)  # no line of these reaches its queue
    engine.runner = SimpleNamespace(rows=1, shared=False)
    assert [*answer_file(engine, tmp_path / "in.jsonl", tmp_path / "out.jsonl", USUAL, "m")] == [1, 2, 3]
    first, second, _ = map(json.loads, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines())
    assert "\ud800" in first["error"] and "see\\udc00d" in second["error"]
