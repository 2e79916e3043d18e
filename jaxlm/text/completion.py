"""Completions without a framework: options of sampling, random numbers, prompts, stop strings, text as it arrives.

Both backends decode ids in blocks and hand them to `complete`, so a text is cut and streamed by the same code.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import TextStream, Tokenizer

STREAM_BLOCK = 8
"""Tokens decoded between two looks at the text, when somebody watches or a stop string may come."""

_log = logging.getLogger(__name__)


class Guessed(NamedTuple):
    """Counts of speculation for a text."""

    calls: int = 0
    """Calls of the model that looked at guesses."""
    tokens: int = 0
    """Guessed in them."""
    accepted: int = 0
    """Of the guesses, those that were drawn: so many calls less."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One completed prompt: `text` is cut before a stop string, `tokens` are all new ids, end of text included."""

    prompt: str
    text: str
    tokens: list[int]
    finish: str = "length"
    """Why it ended: `stop` by an end id or stop string, `length` at the number of tokens asked for."""
    guessed: Guessed = dataclasses.field(default=Guessed(), compare=False)


def right_padded(prompts: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segments [B, width] of prompts, and their lengths [B]; padding has position, segment 0."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    real = np.arange(width, dtype=np.int32) < lengths[:, None]
    tokens = np.full(real.shape, pad_id, np.int32)
    tokens[real] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    positions = np.where(real, np.arange(width, dtype=np.int32), 0)
    return tokens, positions, real.astype(np.int32), lengths


def check_prompts(cfg: config.Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse what the model cannot complete; log a warning when it looks back further than in training.

    Raises:
        UserError: no prompt, an empty one, an id outside the vocabulary, or more tokens than there are positions.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} must be positive")
    if not prompts:
        raise UserError("there is no prompt")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} has no token", "begin with the end-of-text token")
        if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
            raise UserError(
                f"prompt {row} has ids up to {max(prompt)}, model.vocab_size is {cfg.vocab_size}",
                "use the tokenizer that the model was trained with",
            )
    longest = max(map(len, prompts))
    if longest + max_new_tokens <= cfg.max_seq_len or not cfg.max_seq_len or cfg.streams:
        return
    problem = f"a prompt of {longest} and {max_new_tokens} new tokens exceed model.max_seq_len = {cfg.max_seq_len}"
    if cfg.positions in ("learned", "sinusoidal"):
        room = cfg.max_seq_len - longest
        raise UserError(problem, f"at most {room} new tokens fit" if room > 0 else "shorten the prompt")
    _log.warning("warning: %s: beyond what the model was trained on", problem)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts, in which special tokens may be spelled out, as a document begins in training.

    That is with begin of text where the tokenizer says so (once: a prompt that spells it has it already). Without, an
    empty prompt is the end of text of the document before.

    Raises:
        UserError: a prompt is no UTF-8, or is empty and the tokenizer has neither begin nor end of text.
    """
    for prompt in prompts:
        check_text(prompt, "the prompt")
    encoded = tokenizer.encode_batch(list(prompts), allow_special=True)
    if (bos := tokenizer.bos) is not None:
        return [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    if not all(encoded) and tokenizer.eot is None:
        raise UserError("the prompt is empty and the tokenizer has no end-of-text token", "give a prompt")
    return [ids or [tokenizer.special("eot")] for ids in encoded]


def check_text(text: str, name: str) -> None:
    """Refuse a text that no tokenizer takes, such as an argument of the command line in Latin-1.

    Raises:
        UserError: it has half a surrogate pair, which stands for a byte that is no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise UserError(f"{name} is not UTF-8 (byte {byte:#04x} at {error.start})", "convert it with iconv") from None


def complete(
    blocks: Iterable[np.ndarray],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    stop: Sequence[str] = (),
    stream: Callable[[int, str], None] | None = None,
) -> list[Completion]:
    """Turn blocks of new ids [B, c] into completions; no further block is asked for when every row has ended.

    Args:
        stop: a row ends before the first of these strings.
        stream: called with the row and each piece of text that is final: complete characters, no part of a stop string.
    """
    rows = [_Row(tokenizer, stop, after) for after in tokenizer.encode_batch(list(prompts), allow_special=True)]
    for block in blocks:
        for index, row in enumerate(rows):
            piece = "".join(row.push(int(token)) for token in block[index])
            if stream is not None and piece:
                stream(index, piece)
        if all(row.ended for row in rows):
            break
    for index, row in enumerate(rows):
        piece = row.flush()
        if stream is not None and piece:
            stream(index, piece)
    return [
        Completion(prompt, row.text, row.tokens, "stop" if row.ended else "length")
        for prompt, row in zip(prompts, rows, strict=True)
    ]


class StopStrings:
    """Lets text through until one of the strings appears, and holds back an end that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise UserError("a stop string is empty")
        for string in stop:
            check_text(string, "a stop string")
        self._stop, self._held, self.found = stop, "", False
        self.string = ""
        """The string that was found."""

    def push(self, text: str) -> str:
        """The text that is certain now."""
        if self.found:
            return ""
        text = self._held + text
        starts = [(start, string) for string in self._stop if (start := text.find(string)) >= 0]
        if starts:
            start, self.string = min(starts)
            self.found, self._held = True, ""
            return text[:start]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class _Row:
    """The completion of one prompt while it grows."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], after: Sequence[int]) -> None:
        self._ends = tokenizer.ends  # some models know no end, only that another text begins
        self._characters = TextStream(tokenizer, skip_special=True, after=after)
        self._stop = StopStrings(stop)
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False

    def push(self, token: int) -> str:
        if self.ended:
            return ""
        self.tokens.append(token)
        if token in self._ends:
            self.ended = True
            return ""
        return self._take(self._characters.push(token))

    def flush(self) -> str:
        piece = self._take(self._characters.flush())
        return piece + ("" if self._stop.found else self._take_held())

    def _take(self, text: str) -> str:
        piece = self._stop.push(text)
        self.ended = self.ended or self._stop.found
        self.text += piece
        return piece

    def _take_held(self) -> str:
        held = self._stop.flush()
        self.text += held
        return held


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
