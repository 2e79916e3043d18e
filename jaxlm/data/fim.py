"""Fill-in-the-middle: a text as prefix, suffix and middle, so that a model learns to write between two parts.

    PSM   PRE prefix SUF suffix MID middle EOT          (Bavarian et al. 2022, section 3)
    SPM   PRE SUF suffix MID prefix middle EOT          (their second variant: the marks stand as in PSM)

The three parts are encoded apart, as `prompt` encodes them for a model in use; `rows/local_encoding.py` saves most of
that work. Nothing random is kept: `fill_in` takes the generator of its piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.data.rows.local_encoding import PartsOfText, splits_before_words
from jaxlm.text.tokenizer import Tokenizer

SLACK = 8
"""Tokens that a piece grows by: three marks, an end of text, and what the cut words have more than the whole ones."""
TRIES = 8
"""Spans tried when a piece grows by more than there is room for. The first fits 99 times of 100."""


class Marks(NamedTuple):
    """Ids of the three marks, and of end of text, which follows the middle."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Filled(NamedTuple):
    """A piece that was transformed.

    Attributes:
        tokens: all ids, from the first mark to end of text.
        answer: where in `tokens` the middle begins; it ends with `tokens`.
        spm: whether the suffix comes first.
        span: the characters of the text that are the middle.
    """

    tokens: np.ndarray
    answer: int
    spm: bool
    span: tuple[int, int]


Spans = Callable[[str, np.random.Generator], tuple[int, int] | None]
"""Chooses a middle: the characters from, and to; None when the text has none to choose."""


def arrange(
    marks: Marks, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], *, spm: bool
) -> tuple[list[int], int]:
    """The ids of a transformed text, and where among them the middle begins."""
    if spm:
        out = [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix]
    else:
        out = [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle]
    return [*out, *middle, marks.end], len(out)


def prompt(tokenizer: Tokenizer, marks: Marks, prefix: str, suffix: str, *, spm: bool = False) -> list[int]:
    """Ids after which a model writes the text between `prefix` and `suffix`, up to end of text."""
    parts = tokenizer.encode_batch([prefix, suffix])
    ids, answer = arrange(marks, parts[0], [], parts[1], spm=spm)
    return ids[:answer]


def parts(tokens: Sequence[int] | np.ndarray, marks: Marks) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle and suffix of a transformed piece in PSM order; in SPM the prefix is at the head of the middle.

    Raises:
        ValueError: the marks are not all there, once and in order.
    """
    ids = [int(token) for token in tokens]
    places = [[i for i, token in enumerate(ids) if token == mark] for mark in marks[:3]]
    if [len(place) for place in places] != [1, 1, 1] or ids[-1] != marks.end:
        raise ValueError("not a piece with a prefix, a suffix and a middle")
    (before,), (hole,), (after,) = places
    if not before < hole < after:
        raise ValueError("the marks are not in order")
    return ids[before + 1 : hole], ids[after + 1 : -1], ids[hole + 1 : after]


def by_characters(text: str, random: np.random.Generator) -> tuple[int, int] | None:
    """Two of all places between characters, the ends included: most robust at inference (Bavarian, section 4.4)."""
    first, last = np.sort(random.integers(0, len(text) + 1, 2)).tolist()
    return (first, last) if first < last else None


def by_lines(text: str, random: np.random.Generator) -> tuple[int, int] | None:
    """Whole lines."""
    places = [0, *(match.end() for match in re.finditer("\n", text))]
    if places[-1] != len(text):
        places.append(len(text))
    first, last = np.sort(random.integers(0, len(places), 2)).tolist()
    return (places[first], places[last]) if first < last else None


class FillIn:
    """Transforms pieces of text that are given as ids.

    Args:
        spm_rate: share of the pieces whose suffix comes first.
        least: characters that a text must have.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Marks, *, spm_rate: float = 0.5, least: int = 16) -> None:
        self._tokenizer, self.marks, self._spm_rate, self._least = tokenizer, marks, spm_rate, least
        self._bytes = (
            [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)] if tokenizer.is_byte_level else None
        )
        self._sizes = np.array([len(spelled) for spelled in self._bytes]) if self._bytes else None
        self._local = splits_before_words(tokenizer)
        anchor = tokenizer.encode_batch(["a"])[0]
        self._anchor = anchor, len(tokenizer.decode(anchor))

    def fill_in(
        self, tokens: np.ndarray, random: np.random.Generator, spans: Spans, room: int, *, starts: bool = True
    ) -> Filled | None:
        """Transform a piece, without end of text at its end; None when there is nothing to choose or it cannot grow.

        Args:
            room: tokens that the result may have at most.
            starts: the piece begins a text, where SentencePiece has put a blank that is none of the text's.
        """
        head, text, tail = self._text(tokens, starts)
        if len(text) < self._least or text.isspace():
            return None
        spm = bool(random.random() < self._spm_rate)
        for _ in range(TRIES):
            span = spans(text, random)
            if span is None:
                continue
            pieces = self._encode(tokens[head : len(tokens) - tail], text, *span)
            prefix = [*tokens[:head].tolist(), *pieces[0]]
            suffix = [*pieces[2], *tokens[len(tokens) - tail :].tolist()]
            ids, answer = arrange(self.marks, prefix, pieces[1], suffix, spm=spm)
            if len(ids) <= room:
                return Filled(np.asarray(ids, np.int64), answer, spm, span)
        return None

    def text(self, tokens: np.ndarray, *, starts: bool = False) -> str:
        """The text of ids that lie anywhere in a document; incomplete characters become U+FFFD."""
        if self._bytes is not None:
            return b"".join([self._bytes[i] for i in tokens.tolist()]).decode(errors="replace")
        if starts:
            return self._tokenizer.decode(tokens.tolist())
        ids, length = self._anchor  # SentencePiece drops a space at the beginning of a text, and only there
        return self._tokenizer.decode([*ids, *tokens.tolist()])[length:]

    def _text(self, tokens: np.ndarray, starts: bool) -> tuple[int, str, int]:
        """Ids before the first whole character, the text, ids after the last whole character."""
        if self._bytes is None:
            text = self.text(tokens, starts=starts)
            return (0, text, 0) if "\ufffd" not in text else (0, "", 0)
        spelled = list(map(self._bytes.__getitem__, tokens.tolist()))
        joined = b"".join(spelled)
        try:
            return 0, joined.decode(), 0
        except UnicodeDecodeError:
            pass
        head = next((i for i, part in enumerate(spelled) if part and part[0] & 0xC0 != 0x80), 0)
        for tail in range(min(4, len(spelled) - head)):
            try:
                return head, b"".join(spelled[head : len(spelled) - tail]).decode(), tail
            except UnicodeDecodeError:
                continue
        return 0, "", 0

    def _encode(self, tokens: np.ndarray, text: str, first: int, last: int) -> list[list[int]]:
        """Ids of the text up to `first`, from there to `last`, and from `last` on."""
        whole = [text[:first], text[first:last], text[last:]]
        if not self._local or self._sizes is None:
            return self._tokenizer.encode_batch(whole)
        encoded = PartsOfText(tokens, text, self._sizes, self._tokenizer)
        return [encoded.part(0, first), encoded.part(first, last), encoded.part(last, len(text))]
