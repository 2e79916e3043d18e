"""Speculation: guess the next tokens of a text, let the model look at all of them at once, keep those it draws itself.

Prompt lookup (Saxena 2023): what followed the newest tokens where they stood before is guessed to follow again. Each
guess is checked by the draw that would have been made there anyway, with the same random number, so a text is the same
with and without; a guess only decides how many tokens one call of the model is worth. With a draft model, `draft` makes
the guesses instead.

Shapes: N tokens of a burst, R rows, W words of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlm.errors import UserError
from jaxlm.infer.engine.draft import Draft, MakeOrders
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.runner import BURST

MOST_GUESSES = BURST - 1
"""Tokens that one call checks at most: the last is drawn without a guess."""
GRAMS = (4, 3, 2)
"""Tokens that must stand alike for what followed them to be guessed; the longest first."""
FIRST_PAUSE = 16
"""Tokens without a guess after the first time that none was right; twice as many after each further time."""


class Lookup:
    """Where the newest tokens of one text stood before."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # of a gram, the place after its newest occurrence but the last

    def push(self, ids: Sequence[int]) -> None:
        """Take further tokens: linear in their number."""
        for token in ids:
            at = len(self._ids)
            for size in GRAMS:
                if at >= size:
                    self._ends[tuple(self._ids[at - size : at])] = at
            self._ids.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the newest ones before; what they repeat goes on by itself."""
        for size in GRAMS:
            at = self._ends.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if at is not None:
                period = self._ids[at:]
                return [period[i % len(period)] for i in range(count)]
        return []


class Guesser:
    """The guesses of one text: as many as were right lately, none for a while where they are wrong.

    Args:
        most: guesses in one call.
    """

    def __init__(self, growing: Growing, most: int) -> None:
        self._growing, self._most = growing, most
        self._lookup, self._known, self._lucky = Lookup(), 0, False
        self._count, self._pause, self._resume = min(4, most), FIRST_PAUSE, 0

    def forced(self) -> list[int]:
        """The next tokens as far as the request or its grammar forces them: they need no luck."""
        growing, made, room = self._growing, len(self._growing.ids), self._room
        self._lucky = False
        if room < 1:
            return []
        asked = growing.request.forced[made : made + room]
        return [*asked] if asked or growing.guide is None else growing.guide.forced()[:room]

    def wanted(self) -> int:
        """How many guesses are worth a try now; none for a while after they were wrong."""
        if self._count == 0 and self._most and len(self._growing.ids) >= self._resume:
            self._count = 1
        count = max(0, min(self._count, self._room))
        self._lucky = count > 0
        return count

    def look_up(self, count: int) -> list[int]:
        """What followed the newest tokens before."""
        self._read()
        return self._lookup.guess(count)

    def learn(self, guessed: int, right: int) -> None:
        """Adapt the number of guesses: doubled when all were right, halved to nothing when none was."""
        if not self._lucky:
            return
        if right == guessed:
            self._count = min(self._most, 2 * max(self._count, 1))
            return
        self._count = max(right, self._count // 2)
        if self._count == 0:
            self._resume = len(self._growing.ids) + self._pause
            self._pause *= 2

    @property
    def _room(self) -> int:
        """Guesses that the text has room for: its last token needs none."""
        return min(MOST_GUESSES, self._growing.limit - len(self._growing.ids) - 1)

    def _read(self) -> None:
        """Take what the text has that the lookup does not know."""
        if not self._known:
            self._lookup.push(self._growing.prompt_ids)
        self._lookup.push(self._growing.ids[max(self._known - 1, 0) :])
        self._known = len(self._growing.ids) + 1


class Speculation:
    """The guesses of all texts.

    Args:
        most: guesses of a text in one call, 0 to 7; 0: none at all.
        draft: makes the guesses; None: prompt lookup.

    Raises:
        UserError: `most` is out of its range, or 0 where there is a draft.
    """

    def __init__(self, most: int, draft: Draft | None = None) -> None:
        if not 0 <= most <= MOST_GUESSES:
            raise UserError(f"speculate = {most} must be between 0 (none) and {MOST_GUESSES} guesses")
        if draft is not None and not most:
            raise UserError("a draft guesses nothing with speculate = 0", f"give 1 to {MOST_GUESSES}")
        self.most = most
        self._draft = draft
        self._guessers: dict[int, Guesser] = {}

    def guess(self, growing: Mapping[int, tuple[int, Growing]], make: MakeOrders) -> dict[int, list[int]]:
        """Guesses by row, for texts by row with their keys; nothing where too few rows have any to be worth a call.

        Args:
            make: the orders of a draft's call.
        """
        guesses: dict[int, list[int]] = {}
        counts: dict[int, int] = {}
        for row, (key, one) in growing.items() if self.most else ():
            guesser = self._guessers.setdefault(key, Guesser(one, self.most))
            if ids := guesser.forced():
                guesses[row] = ids
            elif count := guesser.wanted():
                counts[row] = count
        if self._draft is None:
            found = {row: self._guessers[growing[row][0]].look_up(count) for row, count in counts.items()}
        elif 2 * (len(guesses) + len(counts)) >= len(growing) and counts:
            found = self._draft.guess({row: growing[row] for row in counts}, counts, make)
        else:
            found = {}
        guesses |= {row: ids for row, ids in found.items() if ids}
        return guesses if 2 * len(guesses) >= len(growing) else {}

    def learn(self, key: int, guessed: int, right: int) -> None:
        """Tell the guesser of a text how many of its guesses were drawn."""
        self._guessers[key].learn(guessed, right)

    def forget(self, key: int) -> None:
        """A text has ended."""
        self._guessers.pop(key, None)

    def clear(self) -> None:
        """All rows are empty."""
        if self._draft is not None:
            self._draft.clear()


def follow(growing: Mapping[int, Growing], guesses: dict[int, list[int]], mask_RW: np.ndarray) -> np.ndarray:
    """The masks of the grammars at each of the next tokens [N, R, W], if the guesses before it are right.

    Guesses that a grammar forbids are cut off.
    """
    masks_NRW = np.broadcast_to(mask_RW, (BURST, *mask_RW.shape)).copy()
    for row, one in growing.items():
        if one.guide is not None and row in guesses:
            guesses[row] = one.guide.ahead(guesses[row], masks_NRW, row)
    return masks_NRW
