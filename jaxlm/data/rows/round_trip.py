"""Finds texts that do not come back from their ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from jaxlm.text.tokenizer import Tokenizer

SAMPLED = 64
"""Documents of each side that are decoded again."""
_SAMPLE_CHARS = 2000


class RoundTrip:
    """Decodes the first documents of each side again as they pass.

    Attributes:
        lossy: documents whose first characters do not come back from their ids, and how many were tried.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._seen = Counter[str]()
        self.lossy = (0, 0)

    def look_at(self, documents: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """The same pairs of a side and a `readers.Document`."""
        for side, document in documents:
            if self._seen[side] < SAMPLED:
                self._seen[side] += 1
                text = document.text[:_SAMPLE_CHARS]
                changed, tried = self.lossy
                back = self._tokenizer.decode(self._tokenizer.encode(text))
                self.lossy = changed + (back != text), tried + 1
            yield side, document
