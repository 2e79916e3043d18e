"""`jaxlm tokenizer inspect`: what a tokenizer is, and what it makes of a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxlm.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `jaxlm tokenizer inspect` shows."""

    path: str
    vocab_size: int
    fingerprint: str
    specials: dict[str, int]
    text: str
    ids: list[int]
    pieces: list[bytes]
    round_trip: bool

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None)
        table.add_row("tokenizer", self.path)
        table.add_row("ids", f"{self.vocab_size:,}")
        table.add_row("sha256", self.fingerprint)
        table.add_row("specials", ", ".join(f"{name} {token}" for name, token in self.specials.items()) or "none")
        if self.text:
            shown = Text()
            for i, piece in enumerate(self.pieces):
                style = ("black on cyan", "black on green")[i % 2]
                shown.append(piece.decode(errors="replace").replace("\n", "\\n"), style=style)
            table.add_row("pieces", shown)
            table.add_row("token ids", Text(" ".join(map(str, self.ids))))
            table.add_row("bytes per token", f"{len(self.text.encode()) / max(1, len(self.ids)):.2f}")
            table.add_row("round trip", "exact" if self.round_trip else "NOT exact")
        return table


def inspect(path: str | Path, text: str = "") -> Inspection:
    """Describe a `tokenizer.json` (or the run folder that holds one) and what it makes of a text.

    Raises:
        UserError: the file is missing or no `tokenizer.json`.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    tokenizer = Tokenizer.from_file(path)
    ids = tokenizer.encode(text)
    return Inspection(
        path=str(path),
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint(),
        specials=tokenizer.specials,
        text=text,
        ids=ids,
        pieces=[tokenizer.token_bytes(token) for token in ids],
        round_trip=tokenizer.decode(ids) == text,
    )
