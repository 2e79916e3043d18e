"""Counts held-out documents that are trained on, token for token, in the same corpus or another one of a mixture."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from jaxlm.data.rows.kept import kept_beside
from jaxlm.data.rows.progress_in_bytes import Progress
from jaxlm.data.shards import Shard
from jaxlm.errors import UserError

_log = logging.getLogger(__name__)


def copies(train: Sequence[Shard], validation: Shard) -> tuple[int, float]:
    """How many validation documents are a document of one of the training shards; their share of the tokens."""
    trained = np.concatenate([_digests(shard) for shard in train]) if train else np.zeros(0, np.uint64)
    copied, lengths = np.isin(_digests(validation), trained), np.diff(validation.offsets)
    return int(copied.sum()), float(lengths[copied].sum() / max(1, lengths.sum()))


def _digests(shard: Shard) -> np.ndarray:
    """A hash of the tokens of each document, uint64 [documents]; kept beside the shard where that can be written."""

    def make() -> np.ndarray:
        digests = np.zeros(shard.documents, np.uint64)
        with Progress("looking for copies", shard.tokens.nbytes) as progress:
            for number in range(shard.documents):
                # Token ids of two widths hash alike: shards of one tokenizer have one width.
                tokens = np.ascontiguousarray(shard.tokens[shard.offsets[number] : shard.offsets[number + 1]])
                digests[number] = int.from_bytes(hashlib.blake2b(tokens.data, digest_size=8).digest())
                progress.advance(tokens.nbytes)
        return digests

    keep = kept_beside(shard.folder)
    try:
        return keep("digests", make) if keep else make()
    except UserError:  # a cache that this user may only read
        return make()


def warn_of_copies(what: str, train: Iterable[bytes], held_out: Iterable[bytes]) -> None:
    """Say in one line how many held-out examples are trained on, if there are any.

    Args:
        what: the examples in the plural: `conversations`.
    """
    known, asked = ([hashlib.blake2b(one, digest_size=8).digest() for one in side] for side in (train, held_out))
    trained = frozenset(known)
    if found := sum(one in trained for one in asked):
        _log.warning("warning: data.validation_source: %s", of_copies(found, len(asked), what))


def of_copies(count: int, total: int, what: str, share: str = "") -> str:
    """The line about held-out examples that are trained on; `share` says how much of all they are."""
    return (
        f"{count:,} of {total:,} validation {what}{share} are training {what} to the letter: a loss on them shows "
        "memory; take them out, or name another data.validation_source"
    )
