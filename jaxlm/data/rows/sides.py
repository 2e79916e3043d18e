"""Finds documents on both sides and texts that do not come back from their ids."""

from __future__ import annotations

import array
import hashlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxlm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
SAMPLED = 64
"""Documents of each side that are decoded again."""
_SAMPLE_CHARS = 2000
_PART_CHARS = 1 << 20


class Sides:
    """Looks at the documents of both sides as they pass. It keeps 16 bytes of each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._digests = {side: array.array("Q") for side in ("train", "validation")}
        self._lengths = {side: array.array("Q") for side in ("train", "validation")}
        self.lossy = (0, 0)
        """Documents whose first characters do not come back from their ids, and how many were tried."""

    def look_at(self, documents: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """The same pairs of a side and a `readers.Document`."""
        for side, document in documents:
            digests = self._digests[side]
            if len(digests) < SAMPLED:
                text = document.text[:_SAMPLE_CHARS]
                changed, tried = self.lossy
                back = self._tokenizer.decode(self._tokenizer.encode(text))
                self.lossy = changed + (back != text), tried + 1
            digests.append(_digest(document.text))
            self._lengths[side].append(len(document.text))
            yield side, document

    def copies(self) -> tuple[int, float]:
        """How many validation documents have exactly the text of a training document; their share of the text."""
        train, validation = (np.frombuffer(digests, np.uint64) for digests in self._digests.values())
        copied, lengths = np.isin(validation, train), np.frombuffer(self._lengths["validation"], np.uint64)
        return int(copied.sum()), float(lengths[copied].sum() / max(1, lengths.sum()))


def warn_of_copies(what: str, train: Iterable[bytes], held_out: Iterable[bytes]) -> None:
    """Say in one line how many held-out examples are trained on, if there are any.

    Args:
        what: the examples in the plural: `conversations`.
    """
    known, asked = ([hashlib.blake2b(one, digest_size=8).digest() for one in side] for side in (train, held_out))
    trained = frozenset(known)
    if copies := sum(one in trained for one in asked):
        _log.warning("warning: data.validation_source: %s", of_copies(copies, len(asked), what))


def of_copies(copies: int, total: int, what: str, share: str = "") -> str:
    """The line about held-out examples that are trained on; `share` says how much of all they are."""
    return (
        f"{copies:,} of {total:,} validation {what}{share} are training {what} to the letter: a loss on them shows "
        "memory; take them out, or name another data.validation_source"
    )


def _digest(text: str) -> int:
    """A hash of a text, which is not copied as a whole."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(text), _PART_CHARS):
        digest.update(text[start : start + _PART_CHARS].encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest())
