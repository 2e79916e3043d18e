"""Conversations to rows: whole examples, never cut to fill a row, packed by best fit.

Which examples lie in row r of epoch e is a pure function of (seed, e, r): see `data.rows.epochs`.

Shapes: M examples, N tokens of all examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from jaxlm.data.packing.best_fit import rows_by_fit
from jaxlm.data.rows.epochs import Batch, EpochRows, lay_examples
from jaxlm.errors import UserError
from jaxlm.text.chat import Example

TooLong = Literal["drop", "truncate"]


class Counts(NamedTuple):
    """What became of the conversations of a source."""

    kept: int
    cut: int
    """Kept, without their end."""
    too_long: int
    """Left out."""
    untrained: int
    """Left out: no token of them would be trained."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokens of many examples, one after the other."""

    ids: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " m1"]
    """Example m is `offsets[m]` to `offsets[m + 1]`."""
    counts: Counts

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def trained(self) -> int:
        """Tokens that count."""
        return int(np.count_nonzero(self.weights))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides what is trained."""
        digest = hashlib.sha256()
        for array in (self.ids, self.weights, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def contents(self) -> Iterator[bytes]:
        """The ids of each example."""
        for m in range(len(self)):
            yield self.ids[self.offsets[m] : self.offsets[m + 1]].tobytes()

    def take(self, numbers: np.ndarray) -> Examples:
        """Only these examples, in this order."""
        parts = [slice(self.offsets[m], self.offsets[m + 1]) for m in numbers]
        sizes = [int(part.stop - part.start) for part in parts]
        ids = np.concatenate([self.ids[part] for part in parts] or [self.ids[:0]])
        weights = np.concatenate([self.weights[part] for part in parts] or [self.weights[:0]])
        return Examples(ids, weights, np.cumsum([0, *sizes]).astype(np.int64), self.counts._replace(kept=len(parts)))


def collect(examples: Iterable[Example], seq_len: int, too_long: TooLong, where: str = "the data") -> Examples:
    """Lay examples end to end; those that do not fit into a row are left out or lose their end.

    Args:
        where: they come from, for messages.

    Raises:
        UserError: none is left; says why.
    """
    kept: list[Example] = []
    long = untrained = cut = 0
    for example in examples:
        if len(example.ids) > seq_len + 1:
            if too_long == "drop":
                long += 1
                continue
            example = Example(example.ids[: seq_len + 1], example.weights[: seq_len + 1], cut=True)
        if not example.trained:
            untrained += 1
            continue
        cut += example.cut
        kept.append(example)
    if not kept:
        why = f"{long} are longer than data.seq_len = {seq_len}, {untrained} have no trained token"
        hint = 'a larger data.seq_len, sft.too_long = "truncate", or another sft.train_on'
        if not long + untrained:
            why, hint = "there is none", "other data"
        raise UserError(f"{where}: no example is left to train on: {why}", hint)
    # The first token of an example is nobody's target.
    weights = [np.concatenate([np.zeros(1, np.float32), one.weights[1:]]) for one in kept]
    offsets = np.cumsum([0, *(len(one.ids) for one in kept)]).astype(np.int64)
    counts = Counts(len(kept), cut, long, untrained)
    return Examples(np.concatenate([one.ids for one in kept]), np.concatenate(weights), offsets, counts)


def split(examples: Examples, fraction: float) -> tuple[Examples, Examples]:
    """Training and held-out examples; which is which depends on the tokens of an example alone."""
    if not fraction:
        return examples, examples.take(np.arange(0))
    bound = int(fraction * 2**32)
    held_out = np.array(
        [
            int.from_bytes(hashlib.sha256(examples.ids[start:stop].tobytes()).digest()[:4], "little") < bound
            for start, stop in zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
        ]
    )
    if held_out.all():
        raise UserError(f"data.validation_fraction = {fraction} leaves no example to train on", "a smaller one")
    return examples.take(np.flatnonzero(~held_out)), examples.take(np.flatnonzero(held_out))


class ConversationRows(EpochRows):
    """The endless sequence of rows of packed examples; the rows of an epoch hold each example once.

    `mixture` is None: there is one source.

    Args:
        pack: several examples in a row; else one a row.
    """

    mixture = None

    def __init__(self, examples: Examples, seq_len: int, *, seed: int = 0, pad: int = 0, pack: bool = True) -> None:
        self._examples, self._seq_len, self._seed, self._pad, self._pack = examples, seq_len, seed, pad, pack
        self._sizes = np.diff(examples.offsets) - 1
        self.tokens = int(self._sizes.sum())
        super().__init__()

    @property
    def padding(self) -> float:
        """Share of the places of an epoch that hold nothing."""
        return 1 - self.tokens / (self.rows_per_epoch * self._seq_len)

    def lay(self, rows: Sequence[np.ndarray]) -> Batch:
        """`tokens`, `targets`, `positions`, `segments`, `weights` [B, T] of the examples of each row."""
        return lay_examples(self._examples, [row.tolist() for row in rows], self._seq_len, self._pad)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The examples of each row of an epoch."""
        random = np.random.default_rng([self._seed, epoch])
        order_M = random.permutation(len(self._sizes))
        if not self._pack or not len(order_M):
            return [order_M[m : m + 1] for m in range(len(order_M))]
        rows = rows_by_fit(order_M, self._sizes, self._seq_len)
        return [random.permutation(rows[r]) for r in random.permutation(len(rows))]
