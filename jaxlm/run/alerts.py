"""Red flags while training: a loss or a gradient norm far above what was usual a moment ago, samples that grow or do
not end.

Imports neither jax nor torch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FLAGS = {"loss": 1.5, "grad_norm": 10.0}
"""What is watched, and how many times the median of the last `RECENT` steps is worth a line."""
RECENT = 100
ENOUGH = 20
"""Steps that make a median worth comparing with."""
GROWN = 1.5
"""How many times their first length samples may have before a line."""
GROWN_BY_REWARD = 1.1
"""The same, where longer samples of a prompt have the larger rewards."""
FOR_LENGTH = 0.5
"""Correlation of reward and length from which on a reward pays for length: a quarter of its variance."""
BY_CHANCE = 6.0
"""How many standard deviations of a phase's mean length may be chance. Medians of three phases differ by about one."""
FEW = 8.0
"""That deviation is estimated: of n phases, the bound is 1 + FEW / n times larger."""
ENDLESS = 50
"""Steps without a sample that ends before a line."""
SILENT = 100
"""Steps between two lines of one kind."""
WORSE = 2.0
"""How many times larger than at the last line of its kind a deviation must be, to be worth another."""


class Alerts:
    """Looks at every step and speaks seldom."""

    def __init__(self, ends: Sequence[int] = (), updates_per_phase: int = 1) -> None:
        """Args:
        ends: the ids that end a sample, of a stage that draws some.
        updates_per_phase: how many steps in a row report the same samples.
        """
        self._recent = {name: deque[float](maxlen=RECENT) for name in FLAGS}
        self._told: dict[str, tuple[int, float]] = {}
        """The step of the last line of each kind, and how large the deviation was."""
        self._ends, self._endless, self._updates_per_phase = ends, 0, updates_per_phase
        self._lengths, self._correlations = list[float](), list[float]()
        """Each phase's mean length of samples, and its correlation of their rewards with their lengths."""

    def look(self, step: int, metrics: Mapping[str, Any]) -> Iterator[str]:
        """Lines about a step, if it stands out."""
        for name, factor in FLAGS.items():
            value, recent = metrics[name], self._recent[name]
            if not math.isfinite(value):  # the guard speaks of it
                continue
            if len(recent) >= ENOUGH:
                usual = statistics.median(recent)
                # The loss of a policy goes around 0: a ratio of it says nothing.
                scaled = usual > 0 and (name != "loss" or min(recent) > 0)
                if scaled and value > factor * usual and self._is_news(name, step, value / usual):
                    yield f"step {step}: {name} {value:.3g}, {value / usual:.1f} times the median of the last steps"
            recent.append(value)
        if "ended" in metrics and "length" in metrics:
            ended = float(metrics["ended"])
            yield from self._look_at_ends(step, ended)
            if (step - 1) % self._updates_per_phase == 0:
                self._lengths.append(float(metrics["length"]))
                self._correlations.append(float(metrics.get("length_correlation", 0.0)))
                yield from self._look_at_lengths(step, ended)

    def _is_news(self, name: str, step: int, much: float) -> bool:
        """Whether a line of this kind is due: the first, or one of something much worse some time later."""
        before, then = self._told.get(name, (step - SILENT, 0.0))
        if step - before < SILENT or much < WORSE * then:
            return False
        self._told[name] = step, much
        return True

    def _look_at_ends(self, step: int, ended: float) -> Iterator[str]:
        """Samples that none ends."""
        self._endless = self._endless + 1 if ended == 0 else 0
        if self._endless >= ENDLESS and self._is_news("ended", step, 1.0):
            ids = ", ".join(map(str, self._ends))
            yield f"step {step}: no sample has ended for {ENDLESS} steps; the ids that end one: {ids or 'none'}"

    def _look_at_lengths(self, step: int, ended: float) -> Iterator[str]:
        """Samples that grow: a reward may be chased by talking on."""
        if len(self._lengths) <= 5:
            return
        # A reward may be found within a few updates: then even the median of the first three is too late.
        begun = min(self._lengths[0], statistics.median(self._lengths[:3]))
        now, correlation = (statistics.median(each[-3:]) for each in (self._lengths, self._correlations))
        if now - begun <= _by_chance(self._lengths):
            return
        paid = correlation > FOR_LENGTH
        if now > (GROWN_BY_REWARD if paid else GROWN) * begun and self._is_news("length", step, now / begun):
            why = f", the longer the larger their rewards (correlation {correlation:.2f})" if paid else ""
            yield (
                f"step {step}: samples have grown from {begun:.1f} to {now:.1f} tokens{why}, {ended:.0%} of them end; "
                "is the reward for length? `jaxlm rollouts RUN` shows them"
            )


def _by_chance(lengths: Sequence[float]) -> float:
    """How far medians of three phases may differ by chance.

    The deviation of a phase is that from the mean of its neighbours, which a steady growth leaves at zero: in a normal
    distribution its median is 0.6745 * sqrt(3 / 2) standard deviations.
    """
    recent = lengths[-RECENT:]
    apart = [abs(b - (a + c) / 2) for a, b, c in zip(recent, recent[1:], recent[2:], strict=False)]
    return BY_CHANCE * (1 + FEW / len(apart)) * statistics.median(apart) / 0.826
