"""SIGTERM and Ctrl-C: how a run is asked to save and leave, and how all processes do so at the same point.

Python runs a handler only between two bytecodes of the main thread, which may be minutes away while XLA compiles. So
the signal also wakes a thread, which leaves at once where there is nothing to save. Many processes agree through the
preemption service of `jax.distributed`: a notice that reaches one of them stops all at the same one of the points at
which every process asks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

RESUMABLE = 75
"""Exit code of a run that stopped on a signal with nothing unsaved (EX_TEMPFAIL): start it again with --resume."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Item = TypeVar("_Item")


class Interrupted(Exception):
    """What is under way was broken off, to save and leave."""


class Stopped(SystemExit):
    """The run has saved and left, as it was asked to; `code` is 75, after Ctrl-C 130."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(128 + signal.SIGINT if signal_name == "SIGINT" else RESUMABLE)


class StopRequest:
    """While it is entered, signals ask the run to stop; a second Ctrl-C raises KeyboardInterrupt.

    Args:
        agreed: for many processes, whether all of them stop at the point with this number.
        leave: for one process, called with the signal's name when it comes while `nothing_to_save`; it must not return.
    """

    def __init__(self, agreed: Callable[[int], bool] | None, leave: Callable[[str], None]) -> None:
        self.nothing_to_save = True
        """Until the first update there is nothing that a checkpoint does not have, or the seed does not give again."""
        self.stopped = False
        self._agreed, self._leave = agreed, leave
        self._received: list[str] = []
        self._point = 0

    @property
    def signal_name(self) -> str:
        """Of the signal that this process received; SIGTERM where another process did."""
        return self._received[0] if self._received else signal.SIGTERM.name

    def check(self) -> None:
        """Raise `Interrupted` if the run shall stop here. All processes call it at the same points.

        Raises:
            Interrupted: it shall.
        """
        if not self.stopped:
            self._point += 1
            self.stopped = self._agreed(self._point) if self._agreed else bool(self._received)
        if self.stopped:
            raise Interrupted

    def between(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, with a `check` before each."""
        for item in items:
            self.check()
            yield item

    def __enter__(self) -> StopRequest:
        # In a run of many processes SIGTERM belongs to the preemption service, whose handler is none of Python's.
        mine = _SIGNALS if self._agreed is None else (signal.SIGINT,)
        self._previous: dict[Any, Any] = {number: signal.signal(number, self._note) for number in mine}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watch = threading.Thread(target=self._watch_signals, args=(read,), daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._write)
        self._watch.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received.append(signal.Signals(number).name)

    def _watch_signals(self, read: int) -> None:
        with os.fdopen(read, "rb", buffering=0) as pipe:
            while numbers := pipe.read(1):
                if numbers[0] not in self._previous:
                    continue
                if self._agreed:
                    os.kill(os.getpid(), signal.SIGTERM)
                elif self.nothing_to_save and not hasattr(sys, "ps1"):  # an interactive session is not ours to end
                    self._leave(signal.Signals(numbers[0]).name)
