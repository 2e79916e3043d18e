"""Conversations to look at: `jaxlm data inspect` of a stage that trains on them. Other stages show tokens alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.data.turns.rows import Counts
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ShownTurns:
    """One row of conversations: its arrays, which `weights` says what of is trained."""

    number: int
    """Of the row in the run."""
    arrays: dict[str, list[Any]]

    @property
    def padding(self) -> int:
        """Places without a token."""
        return self.arrays["segments"].count(0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"row": self.number, **self.arrays}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedReport:
    """Packed rows of any stage that reads records with a template."""

    source: str
    template: str
    held_out: int
    trained: float
    """Share of the tokens that count."""
    seq_len: int
    rows_per_epoch: int
    padding: float
    """Share of the places of an epoch without a token."""
    tokenizer: Tokenizer

    @property
    def lines(self) -> list[str]:
        """Template, tokens and rows in words."""
        return [
            f"template: {self.template}",
            f"{self.trained:.1%} of the tokens are trained",
            f"{self.rows_per_epoch:,} rows of {self.seq_len} tokens an epoch, {self.padding:.1%} padding",
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationReport(PackedReport):
    """What a stage of conversations is trained on."""

    counts: Counts
    rows: tuple[ShownTurns, ...]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        counts = self.counts
        shown: list[Any] = [
            Text(f"conversations {self.source}", style="bold"),
            f"{counts.kept + self.held_out:,} conversations, {self.held_out:,} of them held out; "
            f"{counts.too_long:,} too long, {counts.cut:,} cut, {counts.untrained:,} without a trained token",
            *self.lines,
        ]
        for row in self.rows:
            title = f"row {row.number}: {max(row.arrays['segments'])} conversations, {row.padding} places of padding"
            shown += [
                Text(f"{title}; [id x weight], trained is green", style="bold"),
                coloured(self.tokenizer, row.arrays),
            ]
        return Group(*shown)


def coloured(tokenizer: Tokenizer, arrays: Mapping[str, list[Any]], heading: Callable[[int], str] | None = None) -> Any:
    """The tokens of a row as they are targets, with their ids; the first of a segment never is one.

    Args:
        arrays: `tokens`, `targets`, `segments` and `weights` of the row.
        heading: names a segment, by its number.
    """
    from rich.text import Text

    shown, before = Text(), 0
    keys = ("tokens", "targets", "segments", "weights")
    for token, target, segment, weight in zip(*(arrays[key] for key in keys), strict=True):
        if not segment:
            break
        if segment != before:
            shown.append("\n" if before else "").append(f"{heading(segment)}: " if heading else "", style="bold")
            shown.append(*_piece(tokenizer, token, 0.0)).append(f"[{token}] ", style="bright_black")
            before = segment
        shown.append(*_piece(tokenizer, target, weight))
        label = f"{target}" if weight in (0, 1) else f"{target} x {weight:g}"
        shown.append(f"[{label}] ", style="bright_black")
    return shown


def _piece(tokenizer: Tokenizer, token: int, weight: float) -> tuple[str, str]:
    text = tokenizer.token_bytes(token).decode(errors="replace").replace("\n", "\\n")
    return text, "black on green" if weight else "dim"


def rows_of_step(train: config.Train, step: int, rows: int) -> np.ndarray:
    """The numbers of the first rows of a step, at most the rows of a batch.

    Raises:
        UserError: the step lies beyond the run.
    """
    if not 1 <= step <= train.steps:
        raise UserError(f"--step {step}: the run has the steps 1 to {train.steps}")
    first = (step - 1) * train.batch_size
    return np.arange(first, first + min(rows, train.batch_size))


def shown_rows(rows: Mapping[str, np.ndarray], numbers: np.ndarray) -> tuple[ShownTurns, ...]:
    """Rows with their numbers, to show."""
    names = ("tokens", "targets", "positions", "segments", "weights")
    return tuple(
        ShownTurns(int(number), {name: rows[name][i].tolist() for name in names}) for i, number in enumerate(numbers)
    )
