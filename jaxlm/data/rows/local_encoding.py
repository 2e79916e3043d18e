"""Parts of a text encoded from the ids of the whole: only the words around a cut are encoded again.

Far from a cut the ids of a text do not depend on it. In byte-level BPE a text is first cut into words by a rule, and
the known rules all cut before a space that an ASCII letter follows, whatever stands before and behind.
"""
# ruff: noqa: RUF001 (a rule of words names the range of Japanese characters)

from __future__ import annotations

import json
import re

import numpy as np

from jaxlm.text.tokenizer import Tokenizer

_SAFE = re.compile(r" [A-Za-z]")
_KNOWN = (  # rules of words of which none goes on from any character to a space that a letter follows
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


class PartsOfText:
    """Encodes parts of a text by its ids, with only the words around the cuts encoded again."""

    def __init__(self, tokens: np.ndarray, text: str, sizes: np.ndarray, tokenizer: Tokenizer) -> None:
        self._tokens, self._text, self._sizes, self._tokenizer = tokens, text, sizes, tokenizer
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
            return self._tokenizer.encode_batch([text[first:last]])[0]
        out = self._tokens[after[1] : before[1]].tolist()
        if first != 0:
            # The space and the letter are encoded too, for rules that look ahead, and taken off again.
            head = self._tokenizer.encode_batch([text[first : after[0] + 2]])[0]
            out = [*self._without_end(head, 2), *out]
        if last != end:
            out += self._tokenizer.encode_batch([text[before[0] : last]])[0]
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


def splits_before_words(tokenizer: Tokenizer) -> bool:
    """Whether ids before a space that an ASCII letter follows, and from there on, do not depend on each other.

    True of byte-level BPE whose words are cut by a rule known to do so, and which changes no character before.
    """
    if not tokenizer.is_byte_level:
        return False
    tree = json.loads(tokenizer.to_json())
    added = [token["content"] for token in tree.get("added_tokens", ()) if not token["special"]]
    normalizer = tree.get("normalizer")
    plain = normalizer is None or (normalizer["type"] == "Sequence" and not normalizer["normalizers"])
    if not plain or any(character.isspace() for content in added for character in content):
        return False
    steps = tree["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    merges = bool(tree["model"].get("merges"))
    for step in steps:
        if (
            step["type"] == "Split"
            and _escaped(step["pattern"].get("Regex")) in _KNOWN
            and step["behavior"] == "Isolated"
        ):
            continue
        if step["type"] != "ByteLevel" or step["add_prefix_space"]:
            return False
    cuts = any(step["type"] == "Split" or step.get("use_regex") for step in steps)
    return cuts or not merges
