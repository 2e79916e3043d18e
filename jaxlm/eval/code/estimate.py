"""pass@k without bias, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError

DRAWS = 10_000


class Estimate(NamedTuple):
    """A mean over problems with its 95 % interval."""

    value: float
    low: float
    high: float
    method: str


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples passes, from c passes among n (Chen et al. 2021, equation 1).

    Raises: UserError if k > n: then it cannot be estimated, whatever c is.
    """
    if not 0 <= c <= n or k < 1:
        raise UserError(f"n = {n}, c = {c}, k = {k} count nothing", "0 <= c <= n and k >= 1")
    if k > n:
        raise UserError(f"pass@{k} needs {k} samples a problem, there are {n}", "make more samples or take a smaller k")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def interval(scores: Sequence[float]) -> Estimate:
    """The mean of problems' scores with a 95 % interval: Wilson's for zeros and ones, else the bootstrap over problems.

    The bootstrap alone would call 0 of 164 certain.
    """
    values = np.asarray(scores, np.float64)
    mean = float(values.mean())
    if set(values.tolist()) <= {0.0, 1.0}:
        low, high = wilson(round(values.sum()), len(values))
        return Estimate(mean, low, high, "Wilson, by problem")
    weights = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), DRAWS)
    low, high = np.quantile(weights @ values / len(values), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), "bootstrap, by problem")


def ratio(above: Sequence[float], below: Sequence[float], items: int = 0) -> Estimate:
    """A ratio of sums over groups (problems, files) with a 95 % interval: precision, F1, a mean over lines of files.

    The bootstrap draws groups, whose items belong together. Where all groups agree it would call that certain, so
    Wilson's interval for as many items stands there (0: as the sum below); 0 of 0 is 0 with the interval [0, 1].
    """
    top, bottom = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if bottom.sum() == 0:
        return Estimate(0.0, 0.0, 1.0, "nothing to divide by")
    value = float(top.sum() / bottom.sum())
    groups = len(top)
    weights = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), DRAWS)
    divisors = weights @ bottom
    drawn = (weights @ top)[divisors > 0] / divisors[divisors > 0]
    low, high = np.quantile(drawn, [0.025, 0.975])
    if high - low < 1e-12:
        n = items or round(bottom.sum())
        return Estimate(value, *wilson(value * n, n), "Wilson, by item")
    return Estimate(value, float(low), float(high), "bootstrap, by group")


def wilson(c: float | int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    z = 1.959963984540054
    middle, spread = (c + z * z / 2) / (n + z * z), z / (n + z * z) * (c * (n - c) / n + z * z / 4) ** 0.5
    return max(0.0, middle - spread), min(1.0, middle + spread)


def check_counts(samples: int, ks: Sequence[int], temperature: float) -> None:
    """Refuse counts that make no estimate. Raises: UserError."""
    if samples < 1:
        raise UserError(f"--samples {samples} makes no sample", "at least 1")
    if max(ks) > samples:
        needs = f"pass@{max(ks)} needs at least {max(ks)} samples a problem, there are {samples}"
        raise UserError(needs, "--samples, --k")
    if temperature == 0 and samples > 1:
        raise UserError(f"temperature 0 makes {samples} equal samples", "greedy is one sample: --samples 1 --k 1")
