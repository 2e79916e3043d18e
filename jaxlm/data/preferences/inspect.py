"""Pairs of answers to look at: `jaxlm data inspect` of a stage that trains on them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.data.preferences.pairs import Counts
from jaxlm.data.turns.inspect import PackedReport, ShownTurns, coloured


@dataclasses.dataclass(frozen=True)
class ShownPairs(ShownTurns):
    """One row of pairs: segment 2k-1 is the first answer of a pair and 2k the second."""

    @property
    def pairs(self) -> int:
        """How many lie in the row."""
        return max(self.arrays["segments"]) // 2

    def name(self, segment: int) -> str:
        """Name the answer of a segment: `chosen`, or for KTO `wanted`, and so on."""
        pair, second = divmod(segment - 1, 2)
        label = self.arrays["labels"][pair]
        if label:
            return "answer to another prompt" if second else "wanted" if label > 0 else "not wanted"
        tie, margin = self.arrays["ties"][pair], self.arrays["margins"][pair]
        beside = ", a tie" if tie else f", margin {margin:g}" if margin else ""
        return ("rejected" if second else "chosen") + beside

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `answers` has a name for each segment."""
        return {**super().as_dict(), "answers": [self.name(segment) for segment in range(1, 2 * self.pairs + 1)]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairReport(PackedReport):
    """The pairs that a stage is trained on, and those that it leaves out."""

    counts: Counts
    other_prompt: int
    """Records left out: their sides are not answers to one prompt."""
    rows: tuple[ShownPairs, ...]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        counts = self.counts
        shown: list[Any] = [
            Text(f"pairs {self.source}", style="bold"),
            f"{counts.kept:,} pairs to train on, {counts.cut:,} of them cut; {self.held_out:,} held out",
            f"left out: {counts.too_long:,} too long, {counts.equal:,} with equal answers, {counts.tied:,} ties, "
            f"{counts.empty:,} without an answer, {self.other_prompt:,} whose sides are not answers to one prompt",
            *self.lines,
        ]
        for row in self.rows:
            title = f"row {row.number}: {row.pairs} pairs, {row.padding} places of padding; [id], what counts is green"
            shown += [Text(title, style="bold"), coloured(self.tokenizer, row.arrays, row.name)]
        return Group(*shown)
