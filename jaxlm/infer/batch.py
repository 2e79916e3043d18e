"""A file of prompts to a file of texts: `jaxlm generate RUN --prompts in.jsonl --out out.jsonl`.

Each line of the first is an object with `prompt` and any option of `Request`; `sampling` is the name of
a preset or an object of its options.
Each line of the second answers the line of the same number. What stands there is kept, so a killed command goes on.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from jaxlm.errors import UserError, did_you_mean
from jaxlm.infer.engine import Engine, Grammar, Reply, Request, Result
from jaxlm.processes import meet
from jaxlm.text.sampling import Sampling, preset

AHEAD = 4
"""Requests under way for each row."""


def answer_file(engine: Engine, prompts: Path, out: Path, defaults: Request, name: str) -> Iterator[int]:
    """Answer every line of `prompts` in `out`, in order; yields the number of lines done after each.

    A line that cannot be answered has an `error` in its place. Of processes that hold the model together the first
    writes, and says to the others how many lines stood there.

    Args:
        defaults: options of lines that do not have their own.
        name: of the model, so that an output of another one is not gone on with.

    Raises:
        UserError: `prompts` cannot be read, `out` holds the answers of something else, or the processes differ.
    """
    lines = _lines(prompts)
    keys = [hashlib.sha256(f"{name}\0{defaults}\0{line}".encode()).hexdigest()[:16] for line in lines]
    writes = not engine.runner.shared or meet.is_first()
    done = _answered(out, keys) if writes else 0
    if engine.runner.shared:
        meet.agree({"the prompts": hashlib.sha256("".join(keys).encode()).hexdigest()[:12]})
        done = int(meet.from_first(str(done)))
    under_way: collections.deque[tuple[int, Reply | str]] = collections.deque()
    following = iter(range(done, len(lines)))
    # Half a surrogate stands as `\ud800`, which JSON reads back as it was.
    with (out if writes else Path(os.devnull)).open("a", encoding="utf-8", errors="backslashreplace") as file:
        while True:
            while len(under_way) < AHEAD * engine.runner.rows and (index := next(following, None)) is not None:
                under_way.append((index, _submit(engine, lines[index], defaults)))
            if not under_way:
                return
            index, reply = under_way.popleft()
            answer = {"error": reply} if isinstance(reply, str) else _answer(reply.result())
            file.write(json.dumps({"index": index, "key": keys[index], **answer}, ensure_ascii=False) + "\n")
            file.flush()
            yield index + 1


def request_of(fields: Mapping[str, Any], defaults: Request) -> Request:
    """The request of a line.

    Raises:
        UserError: an option is unknown or has a wrong value.
    """
    if "prompt" not in fields:
        raise UserError("there is no prompt")
    given = {name: _checked(name, value, Request) for name, value in fields.items()}
    named, looks = given.get("sampling"), given.get("grammar")
    if isinstance(named, str):
        given["sampling"] = preset(named)
    elif named is not None:
        chosen = {name: _checked(name, value, Sampling) for name, value in named.items()}
        given["sampling"] = dataclasses.replace(defaults.sampling, **chosen)
    if looks is not None:
        schema = looks.get("json_schema")
        looks |= {"json_schema": json.dumps(schema)} if isinstance(schema, dict) else {}
        given["grammar"] = Grammar(**{name: _checked(name, value, Grammar) for name, value in looks.items()})
    return dataclasses.replace(defaults, **given)


_WRITTEN: Mapping[str, Any] = {
    "prompt": str | list[int],
    "stop": str | list[str],
    "sampling": str | dict[str, Any],
    "grammar": dict[str, Any] | None,
    "logit_bias": dict[int, float],
}
"""Options that a line writes in another form than `Request` has them."""


@functools.cache
def _kind(name: str, of: type) -> Any:
    """The validator of an option."""
    return TypeAdapter(_WRITTEN[name] if of is Request and name in _WRITTEN else get_type_hints(of)[name])


def _checked(name: str, value: Any, of: type) -> Any:
    """The value of an option as JSON has it.

    Raises:
        UserError: there is no such option, or it is of another type.
    """
    names = [field.name for field in dataclasses.fields(of)]
    if name not in names:
        raise UserError(f"unknown option {name!r}", did_you_mean(name, names))
    try:
        return _kind(name, of).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise UserError(f"{name} = {shown}: {error.errors()[0]['msg'].lower()}") from None


def _submit(engine: Engine, line: str, defaults: Request) -> Reply | str:
    """The reply to a line, or what is wrong with it."""
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            return "the line is no JSON object"
        return engine.submit(request_of(fields, defaults))
    except json.JSONDecodeError as error:
        return f"the line is no JSON: {error}"
    except UserError as error:
        return str(error)


def _answer(result: Result) -> dict[str, Any]:
    prompt = result.request.prompt
    answer: dict[str, Any] = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    choices = [
        {"text": choice.text, "ids": list(choice.ids), "finish": choice.finish}
        | ({"log_probs": [one.log_prob for one in choice.log_probs]} if choice.log_probs else {})
        | ({"error": choice.ended_by} if choice.finish == "error" else {})
        for choice in result.choices
    ]
    answer |= choices[0] | {"usage": dataclasses.asdict(result.usage)}
    return answer | ({"choices": choices} if len(choices) > 1 else {})


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "--prompts names a file of one JSON object a line") from None


def _answered(out: Path, keys: list[str]) -> int:
    """How many lines are answered; a line that was cut off is cut away."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.split(b"\n")[:-1]):
        try:
            fields = json.loads(line)
            same = fields["index"] == number < len(keys) and fields["key"] == keys[number]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"{out}: line {number + 1} does not answer line {number + 1} of these prompts",
                "it is of another model, other options or other prompts: give another --out",
            )
    if len(whole) < len(data):
        out.write_bytes(whole)
    return whole.count(b"\n")
