"""Records of many formats as conversations: which keys say what.

A format is a row of `FORMATS`: the keys that a record must have, and a function from the record to messages. It is
chosen by the keys, or by name. `fields` renames keys that are called otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data.turns.records import Record, records
from jaxlm.errors import UserError, did_you_mean

Messages = list[dict[str, Any]]


class Conversation(NamedTuple):
    """Messages and what goes with them."""

    where: str
    messages: Messages
    tools: list[Any] | None = None


class Format(NamedTuple):
    """How a record becomes a conversation."""

    keys: tuple[str, ...]
    """All of these are there."""
    messages: Callable[[Mapping[str, Any]], Messages]


class Unfit(ValueError):
    """A record is not what its format says."""


def _turns(user: str, assistant: str, **more: Any) -> Messages:
    return [{"role": "user", "content": user, **more}, {"role": "assistant", "content": assistant}]


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unfit(f"{key} is {type(value).__name__}, not text")
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _listed(record: Mapping[str, Any], key: str) -> list[Any]:
    value = record[key]
    if isinstance(value, str):  # a table of a spreadsheet holds JSON as text
        try:
            value = json.loads(value)
        except ValueError:
            raise Unfit(f"{key} is text, not a list of messages") from None
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise Unfit(f"{key} is no list of messages")
    return value


def _messages(record: Mapping[str, Any], key: str = "messages") -> Messages:
    return [_joined(dict(one)) for one in _listed(record, key)]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text; OpenAI's parts of type text are joined, arguments of calls are parsed."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise Unfit("a message has parts that are no text")
        message["content"] = "".join(str(part["text"]) for part in content)
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise Unfit("tool_calls is no list of calls")
    inner = dict(call.get("function", call))
    if isinstance(inner.get("arguments"), str):
        try:
            inner["arguments"] = json.loads(inner["arguments"])
        except ValueError:
            raise Unfit(f"the arguments of the call {inner.get('name')} are not JSON") from None
    return {**call, "type": "function", "function": inner}


_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def _sharegpt(record: Mapping[str, Any]) -> Messages:
    turns = _listed(record, "conversations")
    if turns and "from" not in turns[0]:
        return _messages(record, "conversations")
    found: Messages = []
    system = record.get("system")
    if isinstance(system, str) and system:
        found.append({"role": "system", "content": system})
    for turn in turns:
        role = _SHAREGPT.get(str(turn.get("from")))
        if role is None:
            raise Unfit(f"a turn is from {turn.get('from')!r}; known are {', '.join(_SHAREGPT)}")
        weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        found.append({"role": role, "content": _text(turn, "value") if "value" in turn else None, **weight})
    return found


def _alpaca(record: Mapping[str, Any]) -> Messages:
    instruction = _text(record, "instruction")
    given = _text(record, "input") if record.get("input") else ""
    joined = f"{instruction}\n\n{given}" if given else instruction
    found = _turns(joined, _text(record, "output"), instruction=instruction, input=given)
    system = record.get("system")
    return [{"role": "system", "content": system}, *found] if isinstance(system, str) and system else found


def _prompt_completion(record: Mapping[str, Any]) -> Messages:
    if isinstance(record["prompt"], list):
        return [*_messages(record, "prompt"), *_messages(record, "completion")]
    return _turns(_text(record, "prompt"), _text(record, "completion"))


_SENTIMENTS = {"0": " negative", "1": " positive", "negative": " negative", "positive": " positive"}


def _sst2(record: Mapping[str, Any]) -> Messages:
    label = _text(record, "label")
    if label not in _SENTIMENTS:
        raise Unfit(f"label is {label!r}, not 0 or 1")
    return _turns(f"Review: {_text(record, 'sentence').strip()}\nSentiment:", _SENTIMENTS[label])


def _svamp(record: Mapping[str, Any]) -> Messages:
    question = f"{_text(record, 'Body').strip()} {_text(record, 'Question').strip()}"
    return _turns(f"{question}\nEquation:", f" {_text(record, 'Equation').strip()}")


FORMATS: Mapping[str, Format] = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "mawps": Format(
        ("question", "equation", "answer"),
        lambda r: _turns(f"{_text(r, 'question').strip()}\nEquation:", f" {_text(r, 'equation').strip()}"),
    ),
    "gsm8k": Format(("question", "answer"), lambda r: _turns(_text(r, "question"), _text(r, "answer"))),
    "svamp": Format(("Body", "Question", "Equation"), _svamp),
    "sst2": Format(("sentence", "label"), _sst2),
    "samsum": Format(
        ("dialogue", "summary"),
        lambda r: _turns(f"Summarize this dialogue.\n\n{_text(r, 'dialogue').strip()}", _text(r, "summary").strip()),
    ),
    "nl2bash": Format(("nl", "cmd"), lambda r: _turns(_text(r, "nl"), _text(r, "cmd"))),
    "text": Format(("text",), lambda r: [{"role": "assistant", "content": _text(r, "text")}]),
}
"""Formats by name; of those whose keys a record has, the one with most keys, the first of equals."""


def conversations(
    source: str, *, format: str = "", fields: Mapping[str, str] | None = None, system: str = ""
) -> Iterator[Conversation]:
    """The conversations of a file, a folder or a dataset; see `records`.

    Args:
        format: a name of `FORMATS`; empty: by the keys of each record.
        fields: our key to the key of the source.
        system: a system message for conversations that have none.

    Raises:
        UserError: a record has no known format or is damaged, with its file and row.
    """
    if format and format not in FORMATS:
        raise UserError(f"sft.format = {format!r}: no such format", did_you_mean(format, FORMATS))
    for record in records(source):
        renamed = _renamed(record, fields or {})
        name = format or format_of(renamed.fields, renamed.where)
        if missing := [key for key in FORMATS[name].keys if key not in renamed.fields]:
            hint = f"it has: {', '.join(map(str, renamed.fields))}; [sft.fields] renames"
            raise UserError(f"{record.where}: no {missing[0]!r}, which the format {name} needs", hint)
        try:
            messages = FORMATS[name].messages(renamed.fields)
        except Unfit as error:
            raise UserError(f"{record.where}: {error}", f"read as the format {name}") from None
        if system and not any(message.get("role") == "system" for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        yield Conversation(record.where, messages, _tools(renamed))


def format_of(keys: Collection[str], where: str) -> str:
    """The format of a record with these keys.

    Raises:
        UserError: none fits; with the keys.
    """
    fitting = [name for name, one in FORMATS.items() if set(one.keys) <= set(keys)]
    if not fitting:
        wanted = "; ".join(f"{name}: {', '.join(one.keys)}" for name, one in FORMATS.items())
        raise UserError(f"{where}: no known format has the keys {', '.join(map(str, keys))}", wanted)
    return max(fitting, key=lambda name: len(FORMATS[name].keys))


def _renamed(record: Record, fields: Mapping[str, str]) -> Record:
    if not fields:
        return record
    if missing := next((theirs for theirs in fields.values() if theirs not in record.fields), None):
        raise UserError(f"{record.where}: no {missing!r} (sft.fields)", did_you_mean(missing, record.fields))
    renamed = {ours: record.fields[theirs] for ours, theirs in fields.items()}
    rest = {key: value for key, value in record.fields.items() if key not in fields.values()}
    return Record(record.where, rest | renamed)


def _tools(record: Record) -> list[Any] | None:
    tools = record.fields.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError:
            raise UserError(f"{record.where}: tools is not JSON") from None
    if tools and not (isinstance(tools, Sequence) and not isinstance(tools, str)):
        raise UserError(f"{record.where}: tools is no list")
    return list(tools) if tools else None
