"""Records of preferences as pairs of answers to one prompt, or as single answers that are wanted or not.

| keys | what they hold |
|---|---|
| `prompt` `completion` `label` | KTO: one answer, wanted (true, 1) or not; text or messages |
| `prompt` `chosen` `rejected` | text or messages; an answer may be the whole conversation again |
| `instruction` [`input` `system`] `rejected`, `chosen` or `output` | Alpaca; a `chosen` goes before `output` |
| `conversations` `chosen` `rejected` | ShareGPT: turns, then one turn each |
| `chosen` `rejected` | two whole conversations: messages, or transcripts "\\n\\nHuman: ... \\n\\nAssistant: ..." (HH) |

`margin` (a number, not below 0) and `tie` (true: both are equally good) may go along with a pair.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxlm.data.turns.formats import FORMATS, Messages, Unfit
from jaxlm.data.turns.records import Record
from jaxlm.errors import UserError


class Pair(NamedTuple):
    """Two answers to one prompt."""

    where: str
    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float = 0.0
    """How much better the chosen answer is, in units of a reward model's score."""
    tie: bool = False


class Labelled(NamedTuple):
    """One answer, wanted or not."""

    where: str
    prompt: Messages
    completion: Messages
    wanted: bool


def preference_of(record: Record) -> Pair | Labelled | None:
    """The preference of a record, by its keys; None where its two sides are not answers to one prompt.

    Raises:
        UserError: the record has none of the formats or is damaged, with its file and row.
    """
    fields = record.fields
    try:
        if {"prompt", "completion", "label"} <= fields.keys():
            return Labelled(record.where, _prompt(fields), _answer(fields["completion"], "completion"), _label(fields))
        sides = _sides(fields)
        if sides is None:
            return None
        return Pair(record.where, *sides, margin=_margin(fields), tie=bool(fields.get("tie", False)))
    except Unfit as error:
        raise UserError(f"{record.where}: {error}") from None
    except _Unknown:
        raise UserError(
            f"{record.where}: no known format of preferences has the keys {', '.join(map(str, fields))}",
            "prompt, chosen, rejected; or chosen, rejected; or instruction, output, rejected; or prompt, completion, "
            "label",
        ) from None


class _Unknown(ValueError):
    """The keys of a record are those of no format."""


def _sides(fields: Mapping[str, Any]) -> tuple[Messages, Messages, Messages] | None:
    """Prompt, chosen and rejected; None where there is not one prompt."""
    keys = fields.keys()
    if "rejected" not in keys:
        raise _Unknown
    if {"prompt", "chosen"} <= keys:
        prompt = _prompt(fields)
        return _of_one_prompt(prompt, *(_turns(fields[key], key) for key in ("chosen", "rejected")))
    if "instruction" in keys and keys & {"chosen", "output"}:
        better = _text(fields["chosen" if "chosen" in keys else "output"], "chosen")
        *prompt, chosen = FORMATS["alpaca"].messages({**fields, "output": better})
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
        return asked, [chosen], _answer(fields["rejected"], "rejected")
    if {"conversations", "chosen"} <= keys:
        prompt = FORMATS["sharegpt"].messages(fields)
        return prompt, _answer(fields["chosen"], "chosen"), _answer(fields["rejected"], "rejected")
    if "chosen" in keys:
        return _of_one_prompt([], *(_conversation(fields[key], key) for key in ("chosen", "rejected")))
    raise _Unknown


def _of_one_prompt(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages] | None:
    """Split off the last answers; what stands before them must be the same, with or without the prompt itself."""
    before = [*prompt], [*prompt]
    for shared, turns in zip(before, (chosen, rejected), strict=True):
        rest = turns[:-1]
        shared.extend(rest[len(prompt) :] if rest[: len(prompt)] == prompt else rest)
    answered = all(turns[-1]["role"] == "assistant" for turns in (chosen, rejected))
    if before[0] != before[1] or not before[0] or not answered:
        return None
    return before[0], chosen[-1:], rejected[-1:]


def _prompt(fields: Mapping[str, Any]) -> Messages:
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        return _messages(prompt, "prompt")
    return [{"role": "user", "content": _text(prompt, "prompt")}]


def _turns(value: Any, key: str) -> Messages:
    """Text is one answer; a message or a list of messages ends with one."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": _text(value, key)}]
    turns = _messages(value if isinstance(value, list) else [value], key)
    if not turns or turns[-1]["role"] != "assistant":
        raise Unfit(f"{key} does not end with an answer")
    return turns


def _answer(value: Any, key: str) -> Messages:
    """The answer alone."""
    return _turns(value, key)[-1:]


def _messages(turns: Sequence[Any], key: str) -> Messages:
    """Messages as of OpenAI or of ShareGPT."""
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise Unfit(f"{key} is no text and no list of messages")
    name = "sharegpt" if turns and "from" in turns[0] else "messages"
    found = FORMATS[name].messages({"conversations" if name == "sharegpt" else "messages": list(turns)})
    for turn in found:
        if turn.get("role") is None or (turn["role"] != "assistant" and not isinstance(turn.get("content"), str)):
            raise Unfit(f"{key} is no list of messages: a turn has no role or no text")
    return found


_ROLES = {"Human": "user", "Assistant": "assistant"}


def _conversation(value: Any, key: str) -> Messages:
    """A list of messages, or a transcript."""
    if isinstance(value, list) and value:
        return _messages(value, key)
    before, *parts = re.split(r"\n\n(Human|Assistant):", _text(value, key))
    if before.strip() or not parts:
        raise Unfit(f'{key} is no transcript: it does not begin with "\\n\\nHuman:"')
    return [{"role": _ROLES[role], "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise Unfit(f"{key} is no text" if not isinstance(value, str) else f"{key} is empty")
    return value


def _label(fields: Mapping[str, Any]) -> bool:
    label = fields["label"]
    words = {"true": True, "1": True, "false": False, "0": False}  # as tables of text have them
    if isinstance(label, str) and label.lower() in words:
        return words[label.lower()]
    if label not in (True, False):
        raise Unfit(f"label is {label!r}, not true or false")
    return bool(label)


def _margin(fields: Mapping[str, Any]) -> float:
    value = fields.get("margin", 0.0)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Unfit(f"margin is {value!r}, not a number of at least 0") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise Unfit(f"margin is {value!r}, not a number of at least 0")
    return float(value)


__all__ = ["Labelled", "Messages", "Pair", "preference_of"]
