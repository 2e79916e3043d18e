"""Text as its tokens arrive, in complete characters, at a cost that does not grow with what came before."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxlm.text.tokenizer import Tokenizer

_INCOMPLETE = 3
"""Bytes at the end of a text that may be the beginning of a character, which has four at most."""
_CONTEXT = 8
"""Ids before a new one that are decoded with it: how a piece is spelled depends on its neighbours, not on the text."""


class TextStream:
    """Ids in, text out as soon as its characters are complete; together the parts are what `decode` adds to `after`.

    Args:
        after: ids that stand before. SentencePiece drops a space at the beginning of a text, and only there.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids = [] if tokenizer.is_byte_level else [token for token in after if token not in self._skip]
        self._shown = len(self._tokenizer.decode(self._ids))  # characters of `_ids` that are out

    def push(self, token: int) -> str:
        """Take one id; return the text that has become complete, perhaps empty."""
        if token in self._skip:
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token))
        self._ids.append(token)
        if token in self._tokenizer.fallback_ids:  # a run of bytes is decoded as a whole
            return ""
        text = self._tokenizer.decode(self._ids)
        return self._rest(text, min(len(text) - len(text.rstrip("\ufffd")), _INCOMPLETE))

    def flush(self) -> str:
        """What is left when no more ids come; an incomplete character becomes U+FFFD."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._rest(self._tokenizer.decode(self._ids), 0)

    def _rest(self, text: str, held: int) -> str:
        """New text of `text`, except for its last `held` characters."""
        part = text[self._shown : len(text) - held]
        self._shown += len(part)
        if len(self._ids) > 2 * _CONTEXT:
            self._forget(text)
        return part

    def _forget(self, whole: str) -> None:
        """Keep the last ids alone, from an ordinary piece on: a run of bytes is not cut."""
        start = len(self._ids) - _CONTEXT
        while start and self._ids[start] in self._tokenizer.fallback_ids:
            start -= 1
        kept = self._ids[start:]
        text = self._tokenizer.decode(kept)
        shown = len(text) - (len(whole) - self._shown)
        if start and shown > 0 and whole.endswith(text.lstrip(" ")):
            self._ids, self._shown = kept, shown
