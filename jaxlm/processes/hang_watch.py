"""A process among others that waits for ever is ended: a stuck collective makes no sound, and heartbeats go on.

When one process no longer takes part, all stop in the same step, and none of them fails. So each marks what it begins
and ends; the first that has marked nothing for long enough asks the others where they stand, and says who is behind.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

HUNG = 124
"""Exit code of a process that waited too long; starting the run again is worth a try."""
_TICKS = 20
_KEY = "jaxlm/hung/"


class Watch:
    """Ends this process, with the stack of every thread and one line, when `mark` is not called for `seconds`.

    Time in which the process itself is stopped (SIGSTOP, Ctrl-Z) does not count.

    Args:
        client: the distributed client, through which the processes tell each other where they stand.
    """

    def __init__(self, seconds: float, process_index: int, process_count: int, client: Any) -> None:
        self._seconds, self._me, self._count, self._client = seconds, process_index, process_count, client
        self._marks, self._what, self._ticks = 0, "at the start", 0
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def mark(self, what: str) -> None:
        """Say what this process does from now on; all processes mark the same things in the same order."""
        self._marks, self._what, self._ticks = self._marks + 1, what, 0

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _watch(self) -> None:
        tick = self._seconds / _TICKS
        while not self._closed.wait(tick):
            self._ticks += 1
            if self._ticks > _TICKS:
                self._end(patience=min(self._seconds / 2, 10.0))

    def _end(self, patience: float) -> None:
        faulthandler.dump_traceback(all_threads=True)
        message = f"process {self._me}: nothing finished for {self._seconds:g} s, {self._what}"
        if reports := self._ask(patience):
            message += f"; {behind(reports, self._count)}"
        hint = "its stacks are above; --restarts starts again; distributed.hang_seconds is how long to wait"
        print(f"error: {message} ({hint})", file=sys.stderr, flush=True)
        os._exit(HUNG)

    def _ask(self, patience: float) -> dict[int, tuple[int, str]]:
        """Where each process stands that says so within `patience` seconds."""
        try:
            self._client.key_value_set(f"{_KEY}{self._me}", f"{self._marks} {self._what}", allow_overwrite=True)
            time.sleep(patience)
            answers = self._client.key_value_dir_get(_KEY)
        except Exception:  # jaxlib raises its own; without the first process nobody can be asked
            return {}
        split = {int(key.rpartition("/")[2]): answer.split(" ", 1) for key, answer in answers}
        return {process: (int(marks), what) for process, (marks, what) in split.items()}


def behind(reports: Mapping[int, tuple[int, str]], count: int) -> str:
    """Who keeps the others waiting: those that say nothing, else those with the fewest marks."""
    silent = [process for process in range(count) if process not in reports]
    if silent:
        return f"no word from {_names(silent)}"
    least = min(marks for marks, _ in reports.values())
    late = [process for process, (marks, _) in reports.items() if marks == least]
    if len(late) == count:
        return "all processes stand at the same place"
    return f"{_names(late)} is behind, {reports[late[0]][1]}"


def _names(processes: list[int]) -> str:
    return f"process {', '.join(map(str, sorted(processes)))}"
