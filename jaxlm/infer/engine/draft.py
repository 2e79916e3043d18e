"""A smaller model that guesses: its rows follow those of the large one, and draw with the same random numbers.

A guess is what the draft would draw in the text's place, so a draft that is the model itself is always right. It draws
without penalties, bias and grammar: where those matter it is wrong more often, never harmful.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.runner import BURST, Drawn, Orders, Runner
from jaxlm.infer.engine.scheduler import next_piece
from jaxlm.text.tokenizer import Tokenizer

DRAFT_WIDTHS = (16, 256)
"""Tokens of the pieces that a draft takes: what it missed of a text, and prompts."""
MakeOrders = Callable[[Mapping[int, Growing], int], tuple[Orders, int]]
"""The orders of a call in which these rows draw so many tokens at most, and how many they can."""


@dataclasses.dataclass
class DraftRow:
    """The tokens of a text that a row of the draft holds."""

    key: int
    known: int = 0
    """Tokens of the text that are in the row."""
    tried: Sequence[int] = ()
    """Tokens behind them that are in the row too, right or wrong."""

    def settle(self, ids: Sequence[int]) -> None:
        """Keep of the tokens that were tried those that the text has."""
        for token in self.tried:
            if self.known >= len(ids) - 1 or ids[self.known] != token:
                break
            self.known += 1
        self.tried = ()


class Draft:
    """The rows of a draft, row by row those of the engine.

    Raises:
        UserError: the draft has fewer rows, less room or other ids than the runner of the engine, or keeps no tokens
            that can be taken back.
    """

    def __init__(self, runner: Runner, engine: Runner) -> None:
        for what, ours, theirs in (("rows", runner.rows, engine.rows), ("tokens a row", runner.length, engine.length)):
            if ours < theirs:
                raise UserError(f"the draft has {ours} {what}, the engine {theirs}", "make it with as many")
        if runner.vocab != engine.vocab:
            raise UserError(
                f"the draft knows {runner.vocab} ids, the model {engine.vocab}", "take a draft with the same ids"
            )
        if not runner.speculates:
            raise UserError("the draft has no room for tokens that are taken back", "make it with speculates=True")
        self.runner = runner
        self._rows: dict[int, DraftRow] = {}

    def guess(
        self, wanted: Mapping[int, tuple[int, Growing]], counts: Mapping[int, int], make: MakeOrders
    ) -> dict[int, list[int]]:
        """The next tokens by row, as the draft would draw them; none for rows that it has not caught up with.

        Args:
            wanted: keys and texts by row.
            counts: guesses by row, at least one.
        """
        texts = {row: one for row, (key, one) in wanted.items() if self._follow(row, key, one)}
        if not texts:
            return {}
        states = self._states([*texts])
        # One token more than is guessed: then the last guess has gone through the draft too.
        orders, steps = make(texts, min(max(counts[row] for row in texts) + 1, BURST))
        drawn = self.runner.decode(_bare(orders, steps))
        for row, kept in states.items():
            self.runner.put_back(row, 0, kept)
        guesses = {row: _finite(drawn, row) for row in texts}
        for row, one in texts.items():
            self._rows[row].tried = () if states else [one.last, *guesses[row][:-1]]
        return {row: ids[: counts[row]] for row, ids in guesses.items()}

    def clear(self) -> None:
        """Empty all rows."""
        self._rows.clear()
        self.runner.clear()

    def _states(self, rows: Sequence[int]) -> dict[int, Any]:
        """What rows have, where it cannot be cut back and must be put back."""
        return {row: self.runner.keep(row, 0) for row in rows} if self.runner.has_states else {}

    def _follow(self, row: int, key: int, growing: Growing) -> bool:
        """Put what a row lacks of its text into it, up to a chunk; returns whether only the last token is missing.

        That one is fed as it draws.
        """
        ids, runner = [*growing.prompt_ids, *growing.ids], self.runner
        if row not in self._rows or self._rows[row].key != key:
            runner.reset(row, scrub=True)  # numbers of an earlier text may be NaN: nobody looks at the draft's logits
            self._rows[row] = DraftRow(key)
        ours = self._rows[row]
        ours.settle(ids)
        end = min(len(ids) - 1, ours.known + runner.widths[-1])
        while ours.known < end:
            count, width = next_piece(end - ours.known, runner.widths)
            runner.prefill(row, ids[ours.known : ours.known + count], ours.known, width)
            ours.known += count
        return end == len(ids) - 1


def _finite(drawn: Drawn, row: int) -> list[int]:
    """The tokens that a row drew before its logits were not finite: what is drawn from such need be no id."""
    steps = int(drawn.steps[row])
    bad_N = drawn.bad[:steps, row]
    return drawn.tokens[: int(np.argmax(bad_N)) if bad_N.any() else steps, row].tolist()


def check_draft(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Refuse a draft whose ids mean something else.

    Raises:
        UserError: the tokenizers differ; says in what.
    """
    if ours.fingerprint() == theirs.fingerprint():
        return
    sizes = ours.vocab_size, theirs.vocab_size
    differs = f"it has {sizes[1]} ids, that of the model {sizes[0]}"
    if sizes[0] == sizes[1]:
        pairs = ((i, ours.token_bytes(i), theirs.token_bytes(i)) for i in range(sizes[0]))
        other = next(((i, x, y) for i, x, y in pairs if x != y), None)
        differs = "it cuts texts in another way"
        if other is not None:
            differs = f"its id {other[0]} is {other[2]}, not {other[1]}"
    raise UserError(f"the draft has another tokenizer: {differs}", "take a draft with the same tokenizer.json")


def _bare(orders: Orders, steps: int) -> Orders:
    """Orders without what only the large model's rows count: penalties, bias, grammar, log-probabilities."""
    none = np.zeros_like(orders.biased)
    knobs = (*orders.knobs[:5], *Orders.empty(len(none), 1).knobs[5:])
    until = np.asarray(steps, np.int32)
    return orders._replace(knobs=knobs, until=until, biased=none, ruled=none, scored=none, processed=none)
