"""pass@k against counting, and intervals against what is published."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.eval.code.estimate import check_counts, interval, pass_at_k, ratio, wilson


@pytest.mark.parametrize(("n", "c"), [(6, 0), (6, 1), (6, 4), (6, 6), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        share = sum(any(index < c for index in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)
    assert pass_at_k(20_000, 1, 1) == pytest.approx(1 / 20_000)


def test_what_cannot_be_estimated_is_refused() -> None:
    """The public estimator gives 1 for k > n, even where nothing passed."""
    for n, c, k in ((3, 0, 10), (0, 0, 1), (2, 3, 1), (2, 1, 0)):
        with pytest.raises(UserError):
            pass_at_k(n, c, k)


def test_intervals() -> None:
    assert wilson(0, 164) == pytest.approx((0, 0.0229), abs=1e-4)
    none, half = interval([0.0] * 164), interval([0.0, 1.0] * 50)
    assert (none.value, none.method) == (0, "Wilson, by problem") and none.high > 0.02
    assert half.low == pytest.approx(0.404, abs=1e-3) and half.high == pytest.approx(0.596, abs=1e-3)
    mixed = interval([0.1, 0.9, 0.5, 0.3] * 41)
    assert mixed.method == "bootstrap, by problem" and mixed.low < mixed.value < mixed.high
    spread = 1.96 * np.std([0.1, 0.9, 0.5, 0.3] * 41) / 164**0.5
    assert mixed.high - mixed.value == pytest.approx(spread, rel=0.1)


def test_ratios_of_groups() -> None:
    """As the mean of equal groups; wider where items of a group agree; never certain."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0] * 20
    by_item, mean = ratio(values, [1.0] * 100), interval([0.2, 0.8] * 50)
    assert by_item.value == 0.6 and by_item.high - by_item.low == pytest.approx(4 * 1.96 * 0.3 * 0.8165 / 10, rel=0.1)
    grouped = ratio([10.0 * value for value in values[:10]], [10.0] * 10)
    assert grouped.value == 0.6 and grouped.high - grouped.low > 2.5 * (by_item.high - by_item.low)
    assert ratio([0.4, 1.6] * 50, [2.0, 2.0] * 50)[:3] == pytest.approx(mean[:3], abs=0.02)
    assert ratio([1.0] * 8, [2.0] * 8)[:3] == pytest.approx((0.5, *wilson(8, 16))) and ratio([0.0], [0.0]).high == 1
    # F1 of 8 groups that agree: twice one hit, of twice the hit and one false alarm. Two items each, not three.
    assert ratio([2.0] * 8, [3.0] * 8, items=16)[:3] == pytest.approx((2 / 3, *wilson(16 * 2 / 3, 16)))
    assert ratio([0.0] * 164, [1.0] * 164).high == pytest.approx(0.0229, abs=1e-4)


@pytest.mark.parametrize(
    ("samples", "ks", "temperature", "message"),
    [(0, [1], 0.2, "makes no sample"), (5, [10], 0.2, "pass@10 needs at least 10"),
     (20, [1], 0.0, "temperature 0 makes 20 equal samples")],
)  # fmt: skip
def test_counts_that_make_no_estimate(samples: int, ks: list[int], temperature: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_counts(samples, ks, temperature)
    check_counts(1, [1], 0.0)
