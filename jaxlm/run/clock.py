"""Where the wall time of a run goes: from report to report by kind, and over all its starts as goodput.

What is none of `ASIDE` counts as computing: on an accelerator the host only waits for the device there. Goodput is the
share of the time since the run first began that went into steps which are kept. Lost are compilation, waiting for data,
saving, validation, samples, steps that a crash undid, and the time in which nothing ran. Rollouts are part of the steps
that learn from them; their seconds begin while the update before them is under way.

Imports neither jax nor torch. Times are in seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

ASIDE: tuple[str, ...] = ("startup", "data_wait", "rollouts", "checkpoint", "evaluation", "sampling")
"""`startup` is the first step of a process, which compiles."""
NOT_STEPPING = ("checkpoint", "evaluation", "sampling")
STRAGGLER = 2.0
"""A process is named if it is so many times as late at its steps as the median one, and by a tenth of the time."""


@dataclasses.dataclass(frozen=True)
class Window:
    """The time since the last report."""

    seconds: dict[str, float]
    """By kind: `compute` and those of `ASIDE`."""
    goodput: float
    """Of the whole run, from 0 to 1."""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def stepping(self) -> float:
        """Without what stands between steps."""
        return max(self.total - sum(self.seconds[kind] for kind in NOT_STEPPING), 1e-9)

    @property
    def before_steps(self) -> float:
        """In which this process kept its steps, and those of all other processes, waiting."""
        return self.seconds["data_wait"] + self.seconds["checkpoint"]


class Clock:
    """Adds up where time goes. `now` runs evenly and `wall` tells the time of day, also after a restart."""

    def __init__(self, now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._now, self._wall = now, wall
        self._began, self._productive = wall(), 0.0
        self._aside = dict.fromkeys(ASIDE, 0.0)
        self._since = now()

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"began": self._began, "productive": self._productive}

    def resume(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self._began, self._productive = state["began"], state["productive"]

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Time that is of a kind of `ASIDE`."""
        start = self._now()
        try:
            yield
        finally:
            self._aside[kind] += self._now() - start

    def window(self) -> Window:
        """The time since the last call."""
        now = self._now()
        aside, self._aside = self._aside, dict.fromkeys(ASIDE, 0.0)
        compute = max(now - self._since - sum(aside.values()), 0.0)
        self._since = now
        self._productive += compute + aside["rollouts"]
        return Window({"compute": compute, **aside}, self._productive / max(self._wall() - self._began, 1e-9))


def stragglers(before_steps: Sequence[float], total: float) -> dict[int, float]:
    """Processes that kept the others waiting: number to seconds.

    Args:
        before_steps: `Window.before_steps` of each process.
        total: seconds of the window.
    """
    usual = statistics.median(before_steps)
    return {
        process: seconds
        for process, seconds in enumerate(before_steps)
        if seconds > STRAGGLER * usual and seconds - usual > total / 10
    }
