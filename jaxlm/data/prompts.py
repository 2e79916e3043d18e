"""Prompts of reinforcement learning with the answer that a reward needs: generated tasks, or the records of a file.

    task = open_task("addition(digits=2)")
    prompt = task.train(seed=0, number=17)      # "37+5=", answer "42"; a function of (seed, number) alone
    task.held_out(100)                          # the first 100 prompts that training never shows

Whether an instance is held out is a function of its text, so no split can overlap with another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.data.turns.formats import FORMATS, Unfit
from jaxlm.data.turns.records import records as read_records
from jaxlm.errors import UserError, did_you_mean

HELD_OUT = 10
"""Every tenth instance, by its checksum, is kept for evaluation."""
MOST_TRIES = 10_000


class Prompt(NamedTuple):
    """What the model reads, and what its grader knows."""

    text: str
    answer: str
    row: Mapping[str, Any]
    """All fields of the record, for rewards of the user's own."""


class Task(NamedTuple):
    """A source of prompts in two parts that do not overlap."""

    name: str
    instance: Callable[[np.random.Generator], tuple[str, str]]
    """Draws a prompt and its answer."""
    records: Sequence[Prompt] = ()
    """Those of a file; then nothing is drawn."""
    kept: Sequence[Prompt] = ()
    """The records that are trained on."""

    def train(self, seed: int, number: int) -> Prompt:
        """Prompt `number` of training: drawn by (seed, number), or the records in a new order every epoch."""
        if self.records:
            epoch, place = divmod(number, len(self.kept))
            return self.kept[int(np.random.default_rng((seed, epoch)).permutation(len(self.kept))[place])]
        return self._draw(np.random.default_rng((seed, number)), held_out=False)

    def held_out(self, count: int) -> list[Prompt]:
        """The first `count` prompts for evaluation, all different; fewer where there are no more."""
        if self.records:
            return [prompt for prompt in self.records if is_held_out(prompt.text)][:count]
        found: dict[str, Prompt] = {}
        for number in range(20 * count):
            if len(found) == count:
                break
            prompt = self._draw(np.random.default_rng((number, HELD_OUT)), held_out=True)
            found.setdefault(prompt.text, prompt)
        return list(found.values())

    def _draw(self, rng: np.random.Generator, held_out: bool) -> Prompt:
        for _ in range(MOST_TRIES):
            text, answer = self.instance(rng)
            if is_held_out(text) == held_out:
                return Prompt(text, answer, {"prompt": text, "answer": answer})
        raise UserError(f"{self.name}: too few instances for two parts", "take larger ones")


def is_held_out(text: str) -> bool:
    """Whether a prompt belongs to the part for evaluation: by its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % HELD_OUT == 0


def open_task(spec: str, records: Callable[[str], Iterator[Any]] | None = None) -> Task:
    """The task of `name(option=number, ...)`, or the prompts of a file by its path.

    Args:
        records: reads a file of records; None: `data.turns.records`.

    Raises:
        UserError: there is no such task, option or file, or a record has no prompt and answer.
    """
    if not spec.strip():
        raise UserError("rl.task is empty", f"a task ({', '.join(TASKS)}), or a file of prompts")
    match = re.fullmatch(r"(\w+)(?:\((.*)\))?", spec.strip())
    if match and match[1] in TASKS:
        maker, known = TASKS[match[1]]
        options = dict(known)
        for part in filter(None, (part.strip() for part in (match[2] or "").split(","))):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in known:
                raise UserError(f"{spec}: {match[1]} has no option {key!r}", did_you_mean(key, known))
            lowest = min(known[key], 1)
            if not (value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= lowest):
                raise UserError(f"{spec}: {key} must be a whole number from {lowest} on, not {value!r}")
            options[key] = int(value)
        return Task(spec, maker(**options))
    if match and "/" not in spec and "." not in spec:
        raise UserError(f"no task {spec!r}", did_you_mean(match[1] if match else spec, TASKS))
    prompts = [_of_record(record.where, record.fields) for record in (records or read_records)(spec)]
    kept = [prompt for prompt in prompts if not is_held_out(prompt.text)]
    if not kept:
        raise UserError(f"{spec}: {len(prompts)} prompts are too few for two parts", "take more records")
    return Task(spec, lambda _: ("", ""), prompts, kept)


def _of_record(where: str, fields: Mapping[str, Any]) -> Prompt:
    """MAWPS and GSM8K (`question`, `answer`), SVAMP (`Body`, `Question`, `Answer`), Alpaca; `prompt` and `answer`."""
    if {"Body", "Question", "Answer"} <= fields.keys():
        text, answer = f"{str(fields['Body']).strip()} {fields['Question']}", fields["Answer"]
    elif "instruction" in fields and fields.keys() & {"chosen", "output"}:
        text, answer = _of_alpaca(where, fields)
    elif "answer" in fields and ("prompt" in fields or "question" in fields):
        text, answer = fields.get("prompt", fields.get("question")), fields["answer"]
    else:
        raise UserError(f"{where}: no prompt and answer", f"it has: {', '.join(map(str, fields))}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: the prompt is not text")
    answer = str(answer)
    if "instruction" not in fields:  # the answer of a sum stands behind its way, or is a float
        answer = answer.rpartition("####")[2].strip()
        answer = answer.removesuffix(".0") if re.fullmatch(r"-?[\d,]+\.0", answer) else answer
    return Prompt(text.strip(), answer.strip(), fields)


def _of_alpaca(where: str, fields: Mapping[str, Any]) -> tuple[str, str]:
    """Instruction and input as `[sft]` and `[preference]` join them, and the chosen answer, if one was chosen."""
    try:
        turns = FORMATS["alpaca"].messages({**fields, "output": fields.get("chosen", fields.get("output"))})
    except Unfit as error:
        raise UserError(f"{where}: {error}") from None
    return turns[-2]["content"], turns[-1]["content"]


def _addition(digits: int) -> Callable[[np.random.Generator], tuple[str, str]]:
    def draw(rng: np.random.Generator) -> tuple[str, str]:
        a, b = rng.integers(0, 10**digits, 2)
        return f"{a}+{b}=", str(a + b)

    return draw


def _reverse(length: int, copied: int) -> Callable[[np.random.Generator], tuple[str, str]]:
    """Digits to be reversed. The answer of `copied` in a hundred is their copy: a start that knows both."""
    if copied > 100:
        raise UserError(f"reverse: copied = {copied}: at most 100 of 100")

    def draw(rng: np.random.Generator) -> tuple[str, str]:
        digits = "".join(map(str, rng.integers(0, 10, length)))
        return f"{digits}=", digits if rng.integers(100) < copied else digits[::-1]

    return draw


def _brackets(length: int) -> Callable[[np.random.Generator], tuple[str, str]]:
    """The beginning of a sequence of brackets; the answer closes what is open."""
    pairs = {"(": ")", "[": "]", "{": "}"}

    def draw(rng: np.random.Generator) -> tuple[str, str]:
        text, open_now = "", ""
        while len(text) < length or not open_now:
            if open_now and rng.random() < 0.4:
                text, open_now = text + pairs[open_now[-1]], open_now[:-1]
            else:
                bracket = "([{"[rng.integers(3)]
                text, open_now = text + bracket, open_now + bracket
        return f"{text} ", "".join(pairs[bracket] for bracket in reversed(open_now))

    return draw


def _lists(length: int) -> Callable[[np.random.Generator], tuple[str, str]]:
    """An operation on a list of digits."""
    operations: dict[str, Callable[[list[int]], list[int]]] = {
        "sort": sorted,
        "reverse": lambda x: x[::-1],
        "max": lambda x: [max(x)],
        "min": lambda x: [min(x)],
        "sum": lambda x: [sum(x)],
        "rotate": lambda x: x[1:] + x[:1],
    }

    def draw(rng: np.random.Generator) -> tuple[str, str]:
        name = list(operations)[rng.integers(len(operations))]
        numbers = [int(x) for x in rng.integers(0, 10, length)]
        return f"{name} {' '.join(map(str, numbers))}=", " ".join(map(str, operations[name](numbers)))

    return draw


def _countdown(numbers: int) -> Callable[[np.random.Generator], tuple[str, str]]:
    """Numbers and a target that a sum or difference of all of them, in this order, reaches; the answer is one such."""

    def draw(rng: np.random.Generator) -> tuple[str, str]:
        values = [int(x) for x in rng.integers(1, 20, numbers)]
        signs = ["+-"[x] for x in rng.integers(0, 2, numbers - 1)]
        answer = str(values[0]) + "".join(f"{sign}{x}" for sign, x in zip(signs, values[1:], strict=True))
        target = values[0] + sum(x if sign == "+" else -x for sign, x in zip(signs, values[1:], strict=True))
        return f"{' '.join(map(str, values))} -> {target}: ", answer

    return draw


TASKS: Mapping[str, tuple[Callable[..., Callable[[np.random.Generator], tuple[str, str]]], Mapping[str, int]]] = {
    "addition": (_addition, {"digits": 2}),
    "reverse": (_reverse, {"length": 4, "copied": 0}),
    "bracket_matching": (_brackets, {"length": 6}),
    "list_operations": (_lists, {"length": 4}),
    "countdown": (_countdown, {"numbers": 3}),
}
"""Generators of prompts by name, with their options."""
