"""Conversations as token ids, and which tokens are trained: one function, `encode`, says it all.

    chat = Chat.of(tokenizer, template="auto", beside=Path("runs/smollm2"))
    example = encode(chat, [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}])

The text is the template's; the ids are those of the whole text. An assistant's turn is found by the template's own
`{% generation %}` marks, else by rendering the conversation up to it, which must be a beginning of the whole text. It
ends with the token that ends the turn, which is trained whatever the id of padding is. A special token that a message
spells out stays text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxlm.errors import UserError, did_you_mean
from jaxlm.text.chat_template import Message, Rendered, Template
from jaxlm.text.templates import TEMPLATES, default_name
from jaxlm.text.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "completion", "all"]

_ROLES = ("system", "developer", "user", "assistant", "tool")


class Example(NamedTuple):
    """One conversation as tokens."""

    ids: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    """How much each token counts when it is the target; the first one is never a target."""
    cut: bool = False
    """Whether tokens were left out at its end."""

    @property
    def trained(self) -> int:
        """How many tokens count."""
        return int(np.count_nonzero(self.weights[1:]))


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer with its template."""

    tokenizer: Tokenizer
    template: Template
    words: Mapping[str, str]
    """What the template may name: `bos_token`, `eos_token`, ..."""
    ends: frozenset[int]
    """Ids that end an assistant's turn, or a text."""

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, template: str = "auto", beside: Path | None = None, *, key: str = "sft.template"
    ) -> Chat:
        """The chat of a tokenizer.

        Args:
            template: a name of `TEMPLATES`, the path of a Jinja file, or `auto`: the model's own, else one that the
                tokenizer has the special tokens for.
            beside: the folder of the tokenizer, with the model's own `chat_template.jinja` or `tokenizer_config.json`.
            key: the option that names the template, for messages.

        Raises:
            UserError: there is no such template, it has a syntax error, or it needs tokens that the tokenizer lacks.
        """
        settings = _settings(beside)
        words, ends = _words(tokenizer, settings), _ends(tokenizer, beside, settings)
        if template == "auto" and (own := _own(beside, settings)):
            return cls(tokenizer, own, words, ends)
        name = default_name(tokenizer.specials) if template == "auto" else template
        if name in TEMPLATES:
            named = TEMPLATES[name]
            if missing := [word for word in named.needs if word not in tokenizer.special_spellings]:
                hint = f"{key} = {default_name(tokenizer.specials)!r} fits this tokenizer"
                raise UserError(f"the template {name} needs the special token {missing[0]}", hint)
            begin = tokenizer.token_bytes(tokenizer.bos).decode() if tokenizer.bos is not None else ""
            words["bos_token"] = begin  # as in every text of this tokenizer, whatever the model's own template does
            return cls(tokenizer, Template(named.source, f"the template {name}"), words, ends)
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{key} = {name!r}: no such template or file", did_you_mean(name, TEMPLATES))
        return cls(tokenizer, Template(path.read_text(encoding="utf-8"), name), words, ends)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None, generation_prompt: bool = False
    ) -> Rendered:
        """The text of a conversation; see `Template.render`."""
        return self.template.render(
            messages,
            tools=tools,
            generation_prompt=generation_prompt,
            words=self.words,
            specials=sorted(self.tokenizer.special_spellings),
        )

    def prompt(self, messages: Sequence[Message], *, tools: Sequence[Any] | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant begins to answer.

        Raises:
            UserError: see `encode`.
        """
        check_messages(messages)
        return _tokens(self.tokenizer, self.render(messages, tools=tools, generation_prompt=True))[0]


def encode(
    chat: Chat,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    train_on: TrainOn = "assistant",
    prompt_weight: float = 0.0,
) -> Example:
    """Ids of a conversation and the weight of each token as a target.

    Args:
        train_on: `assistant`: every assistant's turn; `last`: the last one; `completion`: all that follows the first
            prompt; `all`: everything. A message with a `weight` multiplies that of its turn.
        prompt_weight: weight of what is not trained on otherwise.

    Raises:
        UserError: the messages are no conversation, or the template cannot say where an assistant speaks.
    """
    check_messages(messages)
    rendered = chat.render(messages, tools=tools)
    ids, offsets = _tokens(chat.tokenizer, rendered)
    begin, end = np.array(offsets, np.int64).reshape(-1, 2).T
    weights = np.full(len(ids), 1.0 if train_on == "all" else prompt_weight, np.float32)
    if train_on != "all":
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise UserError("a conversation without an assistant's turn", 'train_on = "all" takes every text')
        spans = _spans(chat, messages, tools, rendered, turns if train_on == "assistant" else turns[-1:])
        if train_on == "completion":
            first = _spans(chat, messages, tools, rendered, turns[:1])[0]
            spans = [(first[0], len(rendered.text), 1.0)]
        for start, stop, weight in spans:
            stop = _trained_end(chat, rendered.text, start, stop)
            weights[(begin < stop) & (end > start)] = weight
    return Example(np.array(ids, np.int32), weights)


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse what is no conversation.

    Raises:
        UserError: no message, a message without role or content, an unknown role, a weight that is none.
    """
    if not messages:
        raise UserError("a conversation without a message")
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in _ROLES:
            raise UserError(f"message {number} has the role {role!r}", did_you_mean(str(role), _ROLES))
        content = message.get("content")
        if not isinstance(content, str) and not (role == "assistant" and message.get("tool_calls")):
            raise UserError(f"message {number} ({role}) has no text in `content`", "jaxlm reads text only")
        weight = message.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(
                f"message {number} ({role}) has the weight {weight!r}", "a number from 0 on; 0: not trained"
            )


def _spans(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Any] | None, rendered: Rendered, turns: Sequence[int]
) -> list[tuple[int, int, float]]:
    """First and last character of these assistant's turns in the text, and the weight of each."""
    weigh = [float(messages[turn].get("weight", 1.0)) for turn in turns]
    if chat.template.marks_generation:
        count = sum(message["role"] == "assistant" for message in messages)
        marked = rendered.generated
        if len(marked) != count:
            marked = _merged(chat, messages, tools, rendered)
        number = {turn: i for i, turn in enumerate(i for i, m in enumerate(messages) if m["role"] == "assistant")}
        return [(*marked[number[turn]], weight) for turn, weight in zip(turns, weigh, strict=True)]
    return [(*_by_prefix(chat, messages, tools, rendered, t), weight) for t, weight in zip(turns, weigh, strict=True)]


def _merged(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Any] | None, rendered: Rendered
) -> list[tuple[int, int]]:
    """Generation marks of a template that writes several, or none, for some turns: the turns by prefixes."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [_by_prefix(chat, messages, tools, rendered, turn) for turn in turns]


def _by_prefix(
    chat: Chat, messages: Sequence[Message], tools: Sequence[Any] | None, rendered: Rendered, turn: int
) -> tuple[int, int]:
    """Where a turn stands in the text: after the conversation before it, up to the conversation with it.

    Raises:
        UserError: the template writes what came before differently once more follows.
    """
    # What a template needs to render a beginning is the beginning itself; the end of the whole text needs none.
    last = turn == len(messages) - 1
    until = rendered.text if last else chat.render(messages[: turn + 1], tools=tools).text
    before = _prompt_before(chat, messages[:turn], tools)
    if not rendered.text.startswith(until) or not until.startswith(before):
        raise UserError(
            f"{chat.template.where} rewrites earlier turns (turn {turn} is another text once more follows)",
            'train_on = "last" trains the last turn, or add {% generation %} marks to the template',
        )
    return len(before), len(until)


def _prompt_before(chat: Chat, messages: Sequence[Message], tools: Sequence[Any] | None) -> str:
    return chat.render(messages, tools=tools, generation_prompt=True).text if messages else ""


def _trained_end(chat: Chat, text: str, start: int, stop: int) -> int:
    """The end of a turn: with the special token that ends it, without the line break that a template puts behind."""
    spelled = tuple(chat.tokenizer.special_spellings)
    kept = text[start:stop].rstrip()
    if kept.endswith(spelled):
        return start + len(kept)
    after = text[stop:].lstrip()
    # Some templates write the token that ends a turn only when another message follows, or outside of their marks.
    ending = max((one for one in spelled if after.startswith(one)), key=len, default="")
    return len(text) - len(after) + len(ending) if ending else stop


def _tokens(tokenizer: Tokenizer, rendered: Rendered) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a rendered text and their characters; where messages spell special tokens, these stay text."""
    text = rendered.text
    if not rendered.literal:
        return tokenizer.encode_with_offsets(text, allow_special=True)
    spelled = re.compile("|".join(map(re.escape, sorted(tokenizer.special_spellings, key=len, reverse=True))))
    inside = np.zeros(len(text) + 1, bool)
    for start, stop in rendered.literal:
        inside[start:stop] = True
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    at = 0
    for match in (*(found for found in spelled.finditer(text) if not inside[found.start()]), None):
        until = match.start() if match else len(text)
        parts = [(at, until, False), *([(match.start(), match.end(), True)] if match else [])]
        for start, stop, special in parts:
            found, places = tokenizer.encode_with_offsets(text[start:stop], allow_special=special)
            ids += found
            offsets += [(start + a, start + b) for a, b in places]
        at = match.end() if match else at
    return ids, offsets


def _settings(folder: Path | None) -> dict[str, Any]:
    return _json(folder / "tokenizer_config.json") if folder else {}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _own(folder: Path | None, settings: Mapping[str, Any]) -> Template | None:
    """The model's own template: a file beside its tokenizer, or within its settings."""
    if folder and (file := folder / "chat_template.jinja").is_file():
        return Template(file.read_text(encoding="utf-8"), str(file))
    stored = settings.get("chat_template")
    if isinstance(stored, list):  # several by name
        stored = {one.get("name"): one.get("template") for one in stored if isinstance(one, dict)}.get("default")
    return Template(stored, f"{folder}/tokenizer_config.json") if isinstance(stored, str) else None


def _words(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and the like: as the model's settings have them, else from the tokenizer's own special tokens."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eot, "pad_token": tokenizer.pad}
    words = {name: tokenizer.token_bytes(token).decode() for name, token in ids.items() if token is not None}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        stored = settings.get(name)
        stored = stored.get("content") if isinstance(stored, Mapping) else stored
        words |= {name: stored} if isinstance(stored, str) else {}
    return {"bos_token": "", **words}


def _ends(tokenizer: Tokenizer, folder: Path | None, settings: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a generated text: end of text, end of turn, and what the model's settings name."""
    stored = (_json(folder / "generation_config.json") if folder else {}).get("eos_token_id")
    named = stored if isinstance(stored, list) else [stored]
    ids = {tokenizer.eot, tokenizer.specials.get("end_of_turn"), *(one for one in named if isinstance(one, int))}
    return frozenset(one for one in ids if one is not None)
