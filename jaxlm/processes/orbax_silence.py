"""Keep Orbax's log lines away, while it is imported and while a checkpointer is open: jaxlm says what is wrong."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from typing import Any

_NAMES = ("absl", "asyncio")  # Orbax logs through the first; its abandoned work through the second


class OrbaxSilence:
    """Drops what Orbax logs from now until `end`; then loggers are as before, and their levels never change.

    Also a context: Orbax logs when it is imported, and absl would leave the root logger a handler then.
    """

    def __init__(self) -> None:
        self._root = _AsWithoutHandlers(logging.WARNING)
        if not logging.root.handlers:
            logging.root.addHandler(self._root)
        for name in _NAMES:
            logging.getLogger(name).addFilter(self._keeps)

    def end(self) -> None:
        """Log everything again."""
        logging.root.removeHandler(self._root)
        for name in _NAMES:
            logging.getLogger(name).removeFilter(self._keeps)

    def __enter__(self) -> None:
        """The silence began when it was made."""

    def __exit__(self, *error: object) -> None:
        self.end()

    def _keeps(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL


class _AsWithoutHandlers(logging.Handler):
    """Does what Python does where the root logger has no handler. For absl gives one to a root that has none."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort is not None and not record.name.startswith("jaxlm"):
            logging.lastResort.handle(record)


@functools.cache
def hush_abandoned_work() -> None:
    """After one failed read or write Orbax abandons the others, whose threads then complain of a closed event loop."""
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        closed_loop = str(unraisable.exc_value) == "Event loop is closed"
        if not closed_loop and not inspect.iscoroutine(unraisable.object):
            report(unraisable)

    sys.unraisablehook = hook
