"""A progress bar that counts bytes."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any


class Progress:
    """A progress bar in bytes on the terminal; it appears after a second, so short work shows none."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Add finished bytes."""
        self._done += count
        shown = sys.stderr.isatty() and logging.getLogger(__name__).isEnabledFor(logging.INFO)  # a library is quiet
        if self._bar is None and time.monotonic() - self._start > 1 and shown:
            from rich import progress
            from rich.console import Console

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
            self._bar = progress.Progress(
                *columns, progress.TimeRemainingColumn(), console=Console(stderr=True), transient=True
            )
            self._bar.add_task(self._label, total=self._total)
            self._bar.start()
        if self._bar is not None:
            self._bar.update(0, completed=self._done, total=max(self._total, self._done))
