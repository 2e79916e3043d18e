"""Shares of a mixture: how many of the first n rows of a run each source should have.

Weights are shares of the tokens that carry loss. They may change with the row, and a source that has reached its cap
gives its share to the others; so the targets are piecewise linear in n.

Shapes: S sources, B rows asked for, G stretches of constant shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

RAMP_STRETCHES = 256
"""A ramp between two weights is cut into this many stretches of constant weight, or one a step where that is fewer."""


class Share(NamedTuple):
    """One source of a mixture.

    Attributes:
        weights: (first row, weight) in rising order of rows, the first at row 0. Any unit, zero allowed.
        row_tokens: tokens that carry loss in a row of it, on average.
        cap: rows that it may have in all; its share then goes to the others.
    """

    weights: tuple[tuple[int, float], ...]
    row_tokens: float = 1.0
    cap: float = math.inf


class Targets(NamedTuple):
    """Rows that each source should have after n rows: piecewise linear in n.

    Attributes:
        starts: row at which each stretch begins.
        before: targets there.
        rates: rows of each source for one row of the run, in each stretch.
        end: rows after which no source is left; infinite when one goes on for ever.
    """

    starts: Float64[np.ndarray, "g"]
    before: Float64[np.ndarray, "g s"]
    rates: Float64[np.ndarray, "g s"]
    end: float

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Targets [B, S] after each of these numbers of rows [B]."""
        stretch_B = np.searchsorted(self.starts, rows, side="right") - 1
        return self.before[stretch_B] + (rows - self.starts[stretch_B])[:, None] * self.rates[stretch_B]


def temperature_weights(tokens: Sequence[int], temperature: float) -> list[float]:
    """Weights proportional to `tokens ** (1 / temperature)`: 1 is by size, infinity is equal (Devlin 2018, mBERT)."""
    logs = np.log(np.asarray(tokens, np.float64)) / temperature
    powers = np.exp(logs - logs.max())
    return (powers / powers.sum()).tolist()


def weight_stretches(
    points: Sequence[tuple[int, float]], *, ramp: bool, unit: int = 1
) -> tuple[tuple[int, float], ...]:
    """A schedule of weights over steps as (first row, weight), with `unit` rows a step.

    Without `ramp` a weight holds until the next point. With it, weights between two points are on a line.
    """
    out: list[tuple[int, float]] = []
    for (step, weight), following in zip(points, [*points[1:], None], strict=True):
        out.append((step * unit, weight))
        if ramp and following is not None:
            width = following[0] - step
            cuts = min(width, RAMP_STRETCHES)
            for i in range(1, cuts):
                at = step + width * i // cuts
                out.append((at * unit, weight + (following[1] - weight) * (at - step) / width))
    return tuple(out)


def targets(shares: Sequence[Share], *, stop_with: int | None = None) -> Targets:
    """The targets of a mixture whose sources have the rows `cap` at most.

    Args:
        stop_with: the mixture ends when this source has reached its cap.
    """
    changes = sorted({row for share in shares for row, _ in share.weights})
    caps = np.array([share.cap for share in shares])
    per_row = np.array([share.row_tokens for share in shares])
    starts, before, rates = [], [], []
    now, have = 0.0, np.zeros(len(shares))
    for first, following in zip(changes, [*changes[1:], math.inf], strict=True):
        now = max(now, float(first))
        weights = np.array([weight_at(share.weights, first) for share in shares]) / per_row
        while now < following:
            free = np.where(have < caps, weights, 0.0)
            if not free.any() or (stop_with is not None and have[stop_with] >= caps[stop_with]):
                return Targets(np.array(starts), np.array(before), np.array(rates), float(round(now)))
            rate = free / free.sum()
            starts.append(now)
            before.append(have)
            rates.append(rate)
            # The stretch ends where the first source reaches its cap, or where the weights change.
            with np.errstate(divide="ignore", invalid="ignore"):
                left = np.where(rate > 0, (caps - have) / rate, math.inf)
            length = min(float(left.min()), following - now)
            reached = left <= length * (1 + 1e-12)
            have = np.where(reached, caps, have + rate * (length if math.isfinite(length) else 0.0))
            now += length
    return Targets(np.array(starts), np.array(before), np.array(rates), math.inf)


def weight_at(weights: Sequence[tuple[int, float]], row: int) -> float:
    """The weight that holds at a row."""
    return [weight for first, weight in weights if first <= row][-1]


def from_row(weights: Sequence[tuple[int, float]], row: int) -> tuple[tuple[int, float], ...]:
    """The schedule as it goes on from `row`, counted from there."""
    return ((0, weight_at(weights, row)), *((first - row, weight) for first, weight in weights if first > row))
