"""Keep Orbax's lines away, while it is imported and while a checkpointer is open: jaxlm says what is wrong."""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

_Hook = Callable[[Any], Any]
_NAMES = ("absl", "asyncio")  # Orbax logs through the first; its abandoned work through the second
_lock = threading.Lock()


class OrbaxSilence:
    """Drops what Orbax logs from now until `end`; then loggers are as before, and their levels never change.

    Also what its abandoned work complains of through `sys.unraisablehook`: after one failed read or write Orbax leaves
    the others, whose threads then find a closed event loop. And a context: Orbax logs when it is imported, and absl
    would leave the root logger a handler then.
    """

    _lasting: ClassVar[list[OrbaxSilence]] = []
    _hooks: ClassVar[tuple[_Hook, _Hook]]
    """`sys.unraisablehook` before the first of those that last, and the one in its place."""

    def __init__(self) -> None:
        with _lock:
            if not self._lasting:
                OrbaxSilence._hooks = sys.unraisablehook, _without_abandoned_work(sys.unraisablehook)
                sys.unraisablehook = self._hooks[1]
            self._lasting.append(self)
        self._root = _AsWithoutHandlers(logging.WARNING)
        if not logging.root.handlers:
            logging.root.addHandler(self._root)
        for name in _NAMES:
            logging.getLogger(name).addFilter(self._keeps)

    def end(self) -> None:
        """Log and report everything again."""
        with _lock:
            if self in self._lasting:
                self._lasting.remove(self)
            if not self._lasting and sys.unraisablehook is self._hooks[1]:  # else another hook has been put before it
                sys.unraisablehook = self._hooks[0]
        logging.root.removeHandler(self._root)
        for name in _NAMES:
            logging.getLogger(name).removeFilter(self._keeps)

    def __enter__(self) -> None:
        """The silence began when it was made."""

    def __exit__(self, *error: object) -> None:
        self.end()

    def _keeps(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL


def _without_abandoned_work(report: _Hook) -> _Hook:
    def hook(unraisable: Any) -> None:
        abandoned = str(unraisable.exc_value) == "Event loop is closed" or inspect.iscoroutine(unraisable.object)
        if not (OrbaxSilence._lasting and abandoned):
            report(unraisable)

    return hook


class _AsWithoutHandlers(logging.Handler):
    """Does what Python does where the root logger has no handler. For absl gives one to a root that has none."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.lastResort is not None and not record.name.startswith("jaxlm"):
            logging.lastResort.handle(record)
