"""What a training shows on a terminal: a progress bar, or a line every few seconds."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)
PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal


def shown() -> bool:
    """Whether this process shows what it does: the command line does, a library is quiet unless INFO is logged."""
    return _log.isEnabledFor(logging.INFO)


def tell(message: str) -> None:
    """Print a line on stdout, if this process shows what it does."""
    if shown():
        print(message, flush=True)


@contextlib.contextmanager
def counting(what: str, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar of a pass whose length is not known, until it ends; the function that is yielded takes so many more.

    Nothing is shown before it is called, without a terminal, or where this process is quiet.
    """
    console = Console(stderr=True)
    parts = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"), TimeElapsedColumn()
    quiet = quiet or not shown() or not console.is_terminal
    with Progress(*parts, console=console, transient=True, disable=quiet) as bar:

        def advance(more: int) -> None:
            if not bar.tasks:
                bar.add_task(what, total=None)
            bar.advance(bar.task_ids[0], more)

        yield advance


class Display:
    """The progress bar on a terminal; a line every few seconds elsewhere; nothing if it is to be quiet."""

    def __init__(self, total: int, start: int, *, quiet: bool = False) -> None:
        quiet = quiet or not shown()
        self.console, self._quiet = Console(stderr=True, quiet=quiet), quiet
        self._total, self._printed = total, 0.0
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, status="compiling")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def status(self, row: dict[str, Any]) -> None:
        """Show the latest metrics."""
        text = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s  MFU {row['mfu']:.1%}"
        self._bar.update(self._task, status=text)
        if not self._quiet and not self.console.is_terminal and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            print(f"step {row['step']}/{self._total}  {text}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)
