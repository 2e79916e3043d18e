"""Preferences as tokens: two examples a pair, of which only the answers count.

    read = read_preferences("pairs.jsonl")
    train, held_out = split(read, 0.1)
    pairs = encode_pairs(train.pairs, chat, seq_len)      # examples 2k and 2k+1 belong together

For KTO, `labelled_pairs` puts beside each answer one to another prompt, by which the divergence is estimated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from jaxlm.data.preferences.formats import Labelled, Messages, Pair, preference_of
from jaxlm.data.turns.records import Record, records
from jaxlm.data.turns.rows import Counts as ExampleCounts
from jaxlm.data.turns.rows import Examples
from jaxlm.errors import UserError
from jaxlm.text.chat import Chat, Example, encode


class Read(NamedTuple):
    """The preferences of a source."""

    pairs: list[Pair]
    labelled: list[Labelled]
    other_prompt: int = 0
    """Left out: its two sides are not answers to one prompt."""


class Counts(NamedTuple):
    """What became of the pairs of a source."""

    kept: int = 0
    cut: int = 0
    """Kept, an answer without its end."""
    too_long: int = 0
    """Left out: they do not fit into a row."""
    equal: int = 0
    """Left out: both answers are the same, or what was cut of them is."""
    tied: int = 0
    """Left out: both are equally good, and the loss asks which is better."""
    empty: int = 0
    """Left out: an answer without a token that counts."""

    @property
    def left_out(self) -> str:
        """Why pairs were left out, in words; empty: none was."""
        words = {"too_long": "too long", "equal": "with equal answers", "tied": "ties", "empty": "without an answer"}
        return ", ".join(f"{getattr(self, name)} {text}" for name, text in words.items() if getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Tokens of P pairs: examples 2k and 2k+1 belong together."""

    examples: Examples
    margins: Float32[np.ndarray, " p"]
    ties: Bool[np.ndarray, " p"]
    labels: Int32[np.ndarray, " p"]
    """Of KTO: 1 wanted, -1 not, and the second example answers another prompt; 0: a pair, the first is better."""
    units: Int32[np.ndarray, " p"]
    """Neighbours of one number are laid in one row: of KTO both answers of a record. Numbers rise."""
    counts: Counts

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each answer that count [2 x pairs]."""
        starts = self.examples.offsets[:-1].astype(np.int64)
        return np.add.reduceat(self.examples.weights > 0, starts, dtype=np.int64) if len(starts) else starts

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides what is trained."""
        digest = hashlib.sha256(self.examples.fingerprint.encode())
        grouped = len(self) > 0 and self.units[-1] + 1 < len(self)
        for array in (self.margins, self.ties, self.labels, *([self.units] if grouped else [])):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Sides(NamedTuple):
    """Two answers to be laid side by side."""

    where: str
    first: Messages
    """The whole conversation."""
    second: Messages
    margin: float = 0.0
    tie: bool = False
    label: int = 0


def read_preferences(*sources: str) -> Read:
    """The preferences of files, folders or datasets; see `data.turns.records`.

    Raises:
        UserError: see `preference_of`.
    """
    return sort_preferences(record for one in sources for record in records(one))


def sort_preferences(rows: Iterable[Record]) -> Read:
    """Pairs and labelled answers apart."""
    read = [preference_of(record) for record in rows]
    pairs = [one for one in read if isinstance(one, Pair)]
    labelled = [one for one in read if isinstance(one, Labelled)]
    return Read(pairs, labelled, sum(one is None for one in read))


def split(read: Read, fraction: float) -> tuple[Read, Read]:
    """Training and held-out preferences; which is which depends on the prompt alone, so none is in both."""

    def held_out(one: Pair | Labelled) -> bool:
        text = json.dumps(one.prompt, sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") < fraction * 2**32

    parts = [
        Read(
            [one for one in read.pairs if held_out(one) == wanted],
            [one for one in read.labelled if held_out(one) == wanted],
        )
        for wanted in (False, True)
    ]
    return parts[0], parts[1]


def sides_of(pairs: Iterable[Pair]) -> list[Sides]:
    """The pairs themselves."""
    return [
        Sides(one.where, [*one.prompt, *one.chosen], [*one.prompt, *one.rejected], one.margin, one.tie) for one in pairs
    ]


def labelled_pairs(read: Read) -> list[Sides]:
    """Each answer with its label, beside it one to another prompt: that of an earlier record, or of the last ones.

    A pair is two labelled answers: the chosen is wanted, the rejected is not.

    Raises:
        UserError: all answers are wanted or none is, or all are to one prompt.
    """
    single = read.labelled
    both = [
        Labelled(one.where, one.prompt, answer, wanted)
        for one in read.pairs
        for answer, wanted in ((one.chosen, True), (one.rejected, False))
        if not one.tie
    ]
    found = [*_mismatched(single, 1), *_mismatched(both, 2)]
    labels = {one.label for one in found}
    if len(labels) == 1:
        missing = "not wanted (label false)" if labels == {1} else "wanted (label true)"
        where = found[0].where.rpartition(", row ")[0] or "the data"
        raise UserError(
            f"{where}: KTO needs answers that are wanted and answers that are not", f"no answer is {missing}"
        )
    return found


def _mismatched(answers: Sequence[Labelled], step: int) -> list[Sides]:
    found = []
    for place, one in enumerate(answers):
        earlier = (answers[place - step - back] for back in range(len(answers)) if place - step - back >= -len(answers))
        other = next((o for o in earlier if o.prompt != one.prompt), None)
        if other is None:
            raise UserError(f"{one.where}: KTO needs answers to more than one prompt", "it compares answers of others")
        conversations = [*one.prompt, *one.completion], [*one.prompt, *other.completion]
        found.append(Sides(one.where, *conversations, label=1 if one.wanted else -1))
    return found


def encode_pairs(
    sides: Iterable[Sides], chat: Chat, seq_len: int, *, truncate: bool = False, system: str = "", ties: bool = False
) -> Pairs:
    """The tokens of both conversations of each pair, which lie in one row together; prompts never count.

    Args:
        truncate: answers lose their ends, the longer one first, until both fit into `seq_len` places; else such a pair
            is left out.
        system: a system message for conversations that have none.
        ties: keep pairs that are equally good.

    Raises:
        UserError: the template refuses a conversation, with its file and row.
    """
    counts = dict.fromkeys(Counts._fields, 0)
    kept: list[tuple[tuple[Example, Example], Sides]] = []
    for one in sides:
        if one.tie and not ties:
            counts["tied"] += 1
            continue
        whole = _encoded(chat, one.first, one.where, system), _encoded(chat, one.second, one.where, system)
        fitted = _fitted(*whole, seq_len) if truncate else whole
        if sum(len(side.ids) - 1 for side in fitted) > seq_len:
            counts["too_long"] += 1
        elif not all(side.trained for side in fitted):
            counts["too_long" if any(side.cut for side in fitted) else "empty"] += 1
        elif not one.label and np.array_equal(fitted[0].ids, fitted[1].ids):
            counts["equal"] += 1
        else:
            counts["kept"] += 1
            counts["cut"] += any(side.cut for side in fitted)
            kept.append((fitted, one))
    return _laid(kept, Counts(**counts))


def _encoded(chat: Chat, messages: Messages, where: str, system: str) -> Example:
    if system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return encode(chat, messages, train_on="last")
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from None


def _fitted(first: Example, second: Example, seq_len: int) -> tuple[Example, Example]:
    """Both within `seq_len` places: the longer one is cut down to the other, then both to half."""
    sizes = len(first.ids) - 1, len(second.ids) - 1
    room = max(seq_len - min(sizes), seq_len // 2)
    return _cut(first, room), _cut(second, room)


def _cut(example: Example, places: int) -> Example:
    if len(example.ids) <= places + 1:
        return example
    return Example(example.ids[: places + 1], example.weights[: places + 1], cut=True)


def _laid(kept: Sequence[tuple[tuple[Example, Example], Sides]], counts: Counts) -> Pairs:
    examples = [side for sides, _ in kept for side in sides]
    # The first token of an example is nobody's target; a token of an answer counts once, whatever its message weighs.
    weights = [np.concatenate([np.zeros(1, np.float32), side.weights[1:] != 0]) for side in examples]
    offsets = np.cumsum([0, *(len(side.ids) for side in examples)]).astype(np.int64)
    whole = Examples(
        np.concatenate([np.zeros(0, np.int32), *(side.ids for side in examples)]).astype(np.int32),
        np.concatenate([np.zeros(0, np.float32), *weights]).astype(np.float32),
        offsets,
        ExampleCounts(len(examples), counts.cut, counts.too_long, counts.empty),
    )
    return Pairs(
        whole,
        np.array([one.margin for _, one in kept], np.float32),
        np.array([one.tie for _, one in kept], bool),
        np.array([one.label for _, one in kept], np.int32),
        _units([one for _, one in kept]),
        counts,
    )


def _units(sides: Sequence[Sides]) -> Int32[np.ndarray, " p"]:
    """Answers of one record, of which one is wanted and the other is not, have one number; all others have their own.

    The gradient of KTO is the sum of those of wanted answers less the sum of the others. Where both answers of a prompt
    are in it, what makes any answer likelier cancels; else it is most of the sum (docs/preference.md).
    """
    first = [
        not (before and one.label and one.where == before.where and one.label == -before.label)
        for before, one in zip([None, *sides], sides, strict=False)
    ]
    return (np.cumsum(first) - 1).astype(np.int32)
