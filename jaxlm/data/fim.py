"""Fill-in-the-middle: a text as prefix, suffix and middle, so that a model learns to write what stands between two parts.

    PSM   PRE prefix SUF suffix MID middle EOT          (Bavarian et al. 2022, section 3)
    SPM   PRE SUF suffix MID prefix middle EOT          (their second variant: the marks stand as in PSM)

The three parts are encoded apart, as `prompt` encodes them for a model in use. Far from the cuts the ids of a text do
not depend on them, so only the words around a cut are encoded again where the tokenizer allows it (`splits_before_words`).
Nothing random is kept: `fill_in` takes the generator of its piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

SLACK = 8
"""Tokens that a piece grows by: three marks, an end of text, and what the cut words have more than the whole ones."""
TRIES = 8
"""Spans tried when a piece grows by more than there is room for. The first fits 99 times of 100."""

_SAFE = re.compile(r" [A-Za-z]")
_KNOWN = (  # rules of words of which none goes on from any character to a space that a letter follows
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r'''[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+'''
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    @property
    def is_byte_level(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def to_json(self) -> str: ...


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


def arrange(marks: Marks, prefix: Sequence[int], middle: Sequence[int], suffix: Sequence[int], *, spm: bool) -> tuple[list[int], int]:
    """The ids of a transformed text, and where among them the middle begins."""
    if spm:
        out = [marks.prefix, marks.suffix, *suffix, marks.middle, *prefix]
    else:
        out = [marks.prefix, *prefix, marks.suffix, *suffix, marks.middle]
    return [*out, *middle, marks.end], len(out)


def prompt(encoder: Encoder, marks: Marks, prefix: str, suffix: str, *, spm: bool = False) -> list[int]:
    """Ids after which a model writes the text between `prefix` and `suffix`, up to end of text."""
    parts = encoder.encode_batch([prefix, suffix])
    ids, answer = arrange(marks, parts[0], [], parts[1], spm=spm)
    return ids[:answer]


def parts(tokens: Sequence[int], marks: Marks) -> tuple[list[int], list[int], list[int]]:
    """Prefix, middle and suffix of a transformed piece in PSM order; in SPM the prefix is at the head of the middle.

    Raises:
        ValueError: the marks are not all there, once and in order.
    """
    ids = list(tokens)
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

    def __init__(self, encoder: Encoder, marks: Marks, *, spm_rate: float = 0.5, least: int = 16) -> None:
        self._encoder, self.marks, self._spm_rate, self._least = encoder, marks, spm_rate, least
        self._bytes = [encoder.token_bytes(i) for i in range(encoder.vocab_size)] if encoder.is_byte_level else None
        self._sizes = np.array([len(spelled) for spelled in self._bytes]) if self._bytes else None
        self._local = splits_before_words(encoder)
        anchor = encoder.encode_batch(["a"])[0]
        self._anchor = anchor, len(encoder.decode(anchor))

    def fill_in(self, tokens: np.ndarray, random: np.random.Generator, spans: Spans, room: int) -> Filled | None:
        """Transform a piece, without end of text at its end; None when there is nothing to choose or it cannot grow.

        Args:
            room: tokens that the result may have at most.
        """
        head, text, tail = self._text(tokens)
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

    def text(self, tokens: np.ndarray) -> str:
        """The text of ids that lie anywhere in a document; incomplete characters become U+FFFD."""
        if self._bytes is not None:
            return b"".join([self._bytes[i] for i in tokens.tolist()]).decode(errors="replace")
        ids, length = self._anchor  # SentencePiece drops a space at the beginning of a text, and only there
        return self._encoder.decode([*ids, *tokens.tolist()])[length:]

    def _text(self, tokens: np.ndarray) -> tuple[int, str, int]:
        """Ids before the first whole character, the text, ids after the last whole character."""
        if self._bytes is None:
            text = self.text(tokens)
            return (0, text, 0) if "\ufffd" not in text else (0, "", 0)
        spelled = [self._bytes[i] for i in tokens.tolist()]
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
            return self._encoder.encode_batch(whole)
        plan = _Splices(tokens, text, self._sizes, self._encoder)
        return [plan.part(0, first), plan.part(first, last), plan.part(last, len(text))]


class _Splices:
    """Encodes parts of a text by its ids, with only the words around the cuts encoded again."""

    def __init__(self, tokens: np.ndarray, text: str, sizes: np.ndarray, encoder: Encoder) -> None:
        self._tokens, self._text, self._sizes, self._encoder = tokens, text, sizes, encoder
        self._ends = np.cumsum(sizes[tokens])
        self._ascii = text.isascii()

    def part(self, first: int, last: int) -> list[int]:
        """The ids of `text[first:last]`; at the ends of the text they stay as they are."""
        text, end = self._text, len(self._text)
        if first == last:
            return []
        after = (0, 0) if first == 0 else self._safe_after(first, last)
        before = (end, len(self._tokens)) if last == end else self._safe_before(first, last)
        if after is None or before is None or after[0] > before[0]:
            return self._encoder.encode_batch([text[first:last]])[0]
        out = self._tokens[after[1] : before[1]].tolist()
        if first != 0:
            # The space and the letter are encoded too, for rules that look ahead, and taken off again.
            head = self._encoder.encode_batch([text[first : after[0] + 2]])[0]
            out = [*self._without_end(head, 2), *out]
        if last != end:
            out += self._encoder.encode_batch([text[before[0] : last]])[0]
        return out

    def _without_end(self, ids: list[int], size: int) -> list[int]:
        """The ids without the last ones, which spell `size` bytes together."""
        while size > 0:
            size -= int(self._sizes[ids[-1]])
            ids = ids[:-1]
        return ids

    def _safe_after(self, first: int, last: int) -> tuple[int, int] | None:
        """The first safe place beyond `first` and before `last`: its character, and the ids before it."""
        start = first + 1
        while match := _SAFE.search(self._text, start, last):
            if (place := self._token(match.start())) is not None:
                return match.start(), place
            start = match.start() + 1
        return None

    def _safe_before(self, first: int, last: int) -> tuple[int, int] | None:
        """The last safe place from `first` and before `last`."""
        stop = last
        while (at := self._text.rfind(" ", first + 1, stop)) >= 0:
            letter = self._text[at + 1 : min(at + 2, last)]
            if letter.isascii() and letter.isalpha() and (place := self._token(at)) is not None:
                return at, place
            stop = at
        return None

    def _token(self, character: int) -> int | None:
        """How many ids stand before this character; None when it lies within an id."""
        place = character if self._ascii else len(self._text[:character].encode())
        index = int(np.searchsorted(self._ends, place, side="left")) + 1
        return index if self._ends[index - 1] == place else None


def _escaped(pattern: str | None) -> str:
    return (pattern or "").replace("\r", "\\r").replace("\n", "\\n")


def splits_before_words(encoder: Encoder) -> bool:
    """Whether ids before a space that an ASCII letter follows, and from there on, do not depend on each other.

    True of byte-level BPE whose words are cut by a rule known to do so, and which changes no character before.
    """
    if not encoder.is_byte_level:
        return False
    tree = json.loads(encoder.to_json())
    added = [token["content"] for token in tree.get("added_tokens", ()) if not token["special"]]
    normalizer = tree.get("normalizer")
    plain = normalizer is None or (normalizer["type"] == "Sequence" and not normalizer["normalizers"])
    if not plain or any(character.isspace() for content in added for character in content):
        return False
    steps = tree["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    merges = bool(tree["model"].get("merges"))
    for step in steps:
        if step["type"] == "Split" and _escaped(step["pattern"].get("Regex")) in _KNOWN and step["behavior"] == "Isolated":
            continue
        if step["type"] != "ByteLevel" or step["add_prefix_space"]:
            return False
    cuts = any(step["type"] == "Split" or step.get("use_regex") for step in steps)
    return cuts or not merges
