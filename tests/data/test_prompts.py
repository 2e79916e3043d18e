"""Prompts: functions of seed and number, in two parts that never overlap."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxlm.data.prompts import TASKS, Prompt, is_held_out, open_task
from jaxlm.errors import UserError


@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_is_a_function_of_seed_and_number_and_no_part_overlaps(name: str) -> None:
    task = open_task(name)
    train = [task.train(0, number) for number in range(200)]
    assert train == [task.train(0, number) for number in range(200)]
    assert train != [task.train(1, number) for number in range(200)]
    held_out = task.held_out(50)
    assert len({prompt.text for prompt in held_out}) == 50 == len(held_out)
    assert held_out[:20] == task.held_out(20)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}


def test_the_answers_are_right() -> None:
    for number in range(50):
        text, answer, row = open_task("addition(digits=3)").train(3, number)
        assert eval(text.removesuffix("=")) == int(answer) and row == {"prompt": text, "answer": answer}
        text, answer, _ = open_task("reverse(length=5)").train(3, number)
        assert text == f"{answer[::-1]}=" and len(answer) == 5
        text, answer, _ = open_task("reverse(copied=60)").train(3, number)
        assert answer in (text[:4], text[3::-1])
        text, answer, _ = open_task("countdown").train(3, number)
        numbers, _, target = text.removesuffix(": ").partition(" -> ")
        assert eval(answer) == int(target)
        assert answer.replace("-", "+").split("+") == numbers.split()
        text, answer, _ = open_task("bracket_matching").train(3, number)
        whole = text.strip() + answer
        while any(pair in whole for pair in ("()", "[]", "{}")):
            whole = whole.replace("()", "").replace("[]", "").replace("{}", "")
        assert not whole and answer
    copied = sum(p.answer == p.text[:4] for p in (open_task("reverse(copied=60)").train(3, i) for i in range(300)))
    assert 150 < copied < 210
    assert {open_task("list_operations").train(3, number).text.split()[0] for number in range(50)} == {
        "sort", "reverse", "max", "min", "sum", "rotate"
    }  # fmt: skip


def records(count: int, **more: Any) -> Any:
    def read(_: str) -> Iterator[SimpleNamespace]:
        for i in range(count):
            yield SimpleNamespace(
                where=f"x.jsonl, row {i}", fields={"question": f"{i} apples?", "answer": f"{i}.0"} | more
            )

    return read


def test_records_in_a_new_order_every_epoch() -> None:
    task = open_task("data/x.jsonl", records(40))
    kept = [prompt for prompt in task.records if not is_held_out(prompt.text)]
    first, second = ([task.train(0, epoch * len(kept) + i) for i in range(len(kept))] for epoch in range(2))
    assert first != second and set(first_texts := [p.text for p in first]) == {p.text for p in second}
    assert len(set(first_texts)) == len(kept)
    assert kept[3].answer == str(int(kept[3].text.split()[0]))
    assert len(task.held_out(100)) + len(kept) == 40


def test_formats_of_records() -> None:
    rows = [
        ({"Body": "A has 2. ", "Question": "How many?", "Answer": 2.0}, "A has 2. How many?", "2"),
        ({"question": "q", "answer": "so\n#### 1,234"}, "q", "1,234"),
        ({"prompt": "p", "answer": "yes"}, "p", "yes"),
        ({"instruction": "i", "input": "x", "output": "rude", "chosen": "polite", "rejected": "r"}, "i\n\nx", "polite"),
        ({"instruction": "i", "output": "only"}, "i", "only"),
        ({"instruction": "i", "output": "a #### b, version 2.0"}, "i", "a #### b, version 2.0"),
        ({"question": "q", "answer": "version 2.0"}, "q", "version 2.0"),
    ]
    for fields, text, answer in rows:
        read = lambda _, fields=fields: iter([SimpleNamespace(where="x", fields=fields)] * 2)  # noqa: E731
        task = open_task("x.jsonl", read) if not is_held_out(text) else None
        if task:
            assert task.train(0, 0) == Prompt(text, answer, fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adition", "no task 'adition'"),
        ("addition(digit=2)", "addition has no option 'digit'"),
        ("addition(digits=0)", "digits must be a whole number from 1 on"),
        ("addition(digits=x)", "digits must be a whole number from 1 on"),
        ("addition(digits=²)", "digits must be a whole number from 1 on"),
        ("reverse(copied=101)", "copied = 101: at most 100 of 100"),
        (" ", "rl.task is empty"),
    ],
)
def test_a_task_that_does_not_exist(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        open_task(spec)


def test_records_that_are_no_prompts() -> None:
    with pytest.raises(UserError, match=r"x.jsonl, row 0: no prompt and answer"):
        open_task("x.jsonl", lambda _: iter([SimpleNamespace(where="x.jsonl, row 0", fields={"text": "a"})]))
    with pytest.raises(UserError, match="the prompt is not text"):
        open_task("x.jsonl", records(3, question=" "))
    with pytest.raises(UserError, match="too few instances"):
        for held_out in (False, True):
            open_task("addition")._replace(instance=lambda _: ("1+1=", "2"))._draw(np.random.default_rng(0), held_out)
