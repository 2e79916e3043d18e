"""Figures that a benchmark keeps in the folder of its runs beside their options, so that a stopped command goes on."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PLACES = ("--out", "--runs", "--kept", "--folder")
"""Options that say where files go, which nobody else needs to know."""


def this_command() -> str:
    """The command of this process, as it was typed, but for places of files."""
    words = ["", *sys.orig_argv[1:]]
    kept = [word for before, word in itertools.pairwise(words) if not {before, word} & {*PLACES}]
    return " ".join(["python", *kept])


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def merged(record: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a record, those of the same names replaced by new ones.

    Args:
        record: a file of `results/`; a figure of it that does not say how it was measured takes the record's command.
    """
    whole = {key: record[key] for key in ("command", "time") if key in record}
    return {name: {"measured": whole, **figure} for name, figure in record.get("figures", {}).items()} | dict(figures)


class Kept:
    """Figures by name, each beside the options that it was measured with.

    Args:
        file: JSON; it need not be there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def figures(self) -> dict[str, Any]:
        """All that are kept."""
        return {name: {"measured": {}, **entry["figure"]} for name, entry in self._entries.items()}

    def get(self, name: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figure of this name; None: it is not there.

        Raises:
            SystemExit: it was measured with other options.
        """
        if name not in self._entries:
            return None
        theirs, ours = self._entries[name]["options"], json.loads(json.dumps(options))
        other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if other:
            values = ", ".join(f"{key} = {theirs.get(key)} there, {ours.get(key)} here" for key in other)
            raise SystemExit(
                f"{self.file}: {name!r} has other options: {values}; take another folder, or remove this one"
            )
        return self._entries[name]["figure"]

    def put(self, name: str, options: Mapping[str, Any], figure: dict[str, Any]) -> dict[str, Any]:
        """Write a figure with the command and the time of its measurement; returns it."""
        figure = {**figure, "measured": {"command": this_command(), "time": now()}}
        self._entries[name] = {"options": dict(options), "figure": figure}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._entries, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.file)
        return figure

    def remove(self, name: str) -> None:
        """Forget a figure; it is measured again."""
        self._entries.pop(name, None)

    def measured(self, name: str, options: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figure of this name: kept, or measured and written now."""
        figure = self.get(name, options)
        return self.put(name, options, make()) if figure is None else figure
