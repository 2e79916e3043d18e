"""Red flags while training: a loss or a gradient norm far above what was usual a moment ago.

Imports neither jax nor torch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

FLAGS = {"loss": 1.5, "grad_norm": 10.0}
"""What is watched, and how many times the median of the last `RECENT` steps is worth a line."""
RECENT = 100
ENOUGH = 20
"""Steps that make a median worth comparing with."""
SILENT = 100
"""Steps between two lines of one kind."""


class Alerts:
    """Looks at every step and speaks seldom."""

    def __init__(self) -> None:
        self._recent = {name: deque[float](maxlen=RECENT) for name in FLAGS}
        self._told = dict.fromkeys(FLAGS, -SILENT)

    def look(self, step: int, metrics: Mapping[str, Any]) -> Iterator[str]:
        """Lines about a step, if it stands out."""
        for name, factor in FLAGS.items():
            value, recent = metrics[name], self._recent[name]
            if not math.isfinite(value):  # the guard speaks of it
                continue
            if len(recent) >= ENOUGH and step - self._told[name] >= SILENT:
                usual = statistics.median(recent)
                if value > factor * usual:
                    self._told[name] = step
                    yield f"step {step}: {name} {value:.3g}, {value / usual:.1f} times the median of the last steps"
            recent.append(value)
