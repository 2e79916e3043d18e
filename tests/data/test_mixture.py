"""Mixtures: after any number of rows each source has its share to within one row, and its rows in order without gap."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import mixture
from jaxlm.data.mixture import BLOCK, Mixture
from jaxlm.data.rows.shares import Share, targets, temperature_weights, weight_stretches

weights = st.floats(0.001, 1.0)
sources = st.lists(weights, min_size=1, max_size=8)


def constant(*shares: float, **options) -> list[Share]:
    return [Share(((0, share),), **options) for share in shares]


def largest_distance(mixed: Mixture, wanted: np.ndarray, rows: int) -> float:
    """From the targets [rows + 1, S], over all beginnings; also checks that numbers have no gap."""
    source, number = mixed[np.arange(rows)]
    distance = 0.0
    for i in range(mixed.sources):
        here = source == i
        assert np.array_equal(number[here], np.arange(here.sum())), "a source's rows are consecutive"
        had = np.append(0, np.cumsum(here))
        distance = max(distance, float(np.abs(had - wanted[: rows + 1, i]).max()))
    return distance


@settings(max_examples=15)
@given(sources)
def test_each_source_has_its_share_after_any_number_of_rows(shares):
    plan = targets(constant(*shares))
    rows = 3 * BLOCK + 17
    wanted = np.arange(rows + 1)[:, None] * np.array(shares) / sum(shares)
    assert largest_distance(Mixture(plan), wanted, rows) < 1


def test_the_weights_of_the_issue_with_a_change_at_step_100():
    change = 100 * 8
    shares = [Share(((0, before), (change, after))) for before, after in ((0.97, 0.3), (0.02, 0.3), (0.01, 0.4))]
    rows = np.arange(6001)[:, None]
    wanted = np.minimum(rows, change) * [0.97, 0.02, 0.01] + np.maximum(rows - change, 0) * [0.3, 0.3, 0.4]
    assert largest_distance(Mixture(targets(shares)), wanted, 6000) < 1


def test_equal_small_sources_beside_a_large_one():
    """Webster's method alone leaves the quota here; the state is then taken a few rows later."""
    shares = np.array([0.9, *[0.1 / 7] * 7])
    wanted = np.arange(3001)[:, None] * shares
    assert largest_distance(Mixture(targets(constant(*shares))), wanted, 3000) < 1


@settings(max_examples=12)
@given(sources, st.integers(0, 10**9), st.lists(st.integers(0, 3000), min_size=1, max_size=8))
def test_any_row_alone_is_the_row_among_others(shares, far, offsets):
    rows = far + np.array(offsets)
    together = Mixture(targets(constant(*shares)))[rows]
    for i, row in enumerate(rows):
        alone = Mixture(targets(constant(*shares)))[np.array([row])]
        assert (together[0][i], together[1][i]) == (alone[0][0], alone[1][0])


@settings(max_examples=10)
@given(st.lists(st.tuples(weights, weights), min_size=2, max_size=5), st.integers(1, 2000))
def test_weights_changed_by_hand_lose_and_repeat_nothing(pairs, row):
    before, after = zip(*pairs, strict=True)
    first = Mixture(targets(constant(*before)))
    both = first.then(row, constant(*after))
    source, number = both[np.arange(row + 1500)]
    old = first[np.arange(row)]
    assert np.array_equal(source[:row], old[0]) and np.array_equal(number[:row], old[1])
    for i in range(len(pairs)):
        assert np.array_equal(number[source == i], np.arange((source == i).sum()))
        had = np.cumsum(source[row:] == i)
        wanted = np.arange(1, 1501) * after[i] / sum(after)
        assert np.abs(had - wanted).max() < 1
    assert np.array_equal(both.counts(row + 700), np.bincount(source[: row + 700], minlength=len(pairs)))


def test_a_ramp_goes_on_a_line():
    shares = [
        Share(weight_stretches(((0, 0.1), (1000, 0.7)), ramp=True, unit=4)),
        Share(weight_stretches(((0, 0.9), (1000, 0.3)), ramp=True, unit=4)),
    ]
    mixed = Mixture(targets(shares))
    source, _ = mixed[np.arange(8000)]
    assert abs((source[:4000] == 0).mean() - 0.4) < 0.003, "half the way in the mean"
    assert abs((source[1900:2100] == 0).mean() - 0.4) < 0.01
    assert abs((source[4000:] == 0).mean() - 0.7) < 0.001


def test_a_capped_source_gives_its_share_to_the_others():
    shares = [Share(((0, 0.5),), cap=100), Share(((0, 0.3),)), Share(((0, 0.2),))]
    mixed = Mixture(targets(shares))
    source, number = mixed[np.arange(2000)]
    assert (source == 0).sum() == 100 and number[source == 0].max() == 99
    assert np.flatnonzero(source == 0).max() <= 200
    assert abs((source[200:] == 1).sum() - 0.6 * 1800) <= 1
    assert mixed.end == math.inf


def test_when_all_are_capped_the_mixture_ends():
    shares = [Share(((0, 0.5),), cap=70), Share(((0, 0.3),), cap=50), Share(((0, 0.2),), cap=1000)]
    mixed = Mixture(targets(shares))
    assert mixed.end == 1120
    source, _ = mixed[np.arange(1120)]
    assert np.bincount(source).tolist() == [70, 50, 1000]


def test_a_mixture_ends_with_a_named_source():
    shares = [Share(((0, 0.5),)), Share(((0, 0.25),), cap=50), Share(((0, 0.25),))]
    mixed = Mixture(targets(shares, stop_with=1))
    assert mixed.end == 200
    assert np.bincount(mixed[np.arange(200)][0]).tolist() == [100, 50, 50]


def test_a_source_of_weight_zero_waits():
    shares = [Share(((0, 1.0),)), Share(((0, 0.0), (500, 1.0)))]
    source, _ = Mixture(targets(shares))[np.arange(1000)]
    assert not source[:500].any() and (source[500:] == 1).sum() == 250


def test_shares_are_of_tokens_that_carry_loss():
    """Rows of the second source are half padding, so it gets twice the rows (Megatron-Energon#212)."""
    shares = [Share(((0, 0.5),), row_tokens=1000.0), Share(((0, 0.5),), row_tokens=500.0)]
    source, _ = Mixture(targets(shares))[np.arange(3000)]
    assert (source == 0).sum() == 1000


def test_temperature():
    assert temperature_weights([900, 100], 1.0) == pytest.approx([0.9, 0.1])
    assert temperature_weights([900, 100], 2.0) == pytest.approx([0.75, 0.25])
    assert temperature_weights([900, 100], 1e9) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("fault", ["no deadlines", "weights by document"])
def test_planted_faults_are_seen(fault, monkeypatch):
    shares = np.array([0.97, 0.02, 0.01])
    wanted = np.arange(3001)[:, None] * shares
    given_shares = constant(*shares)
    if fault == "no deadlines":  # one source after the other within a block

        def deal(targets, base, first, last):
            counts = mixture._state(targets, last) - mixture._state(targets, first)
            source = np.repeat(np.arange(len(counts)), counts)
            number = np.concatenate([np.arange(count) for count in counts]) + mixture._state(targets, first)[source]
            return source, number

        monkeypatch.setattr(mixture, "_deal", deal)
    else:
        given_shares = [
            share._replace(row_tokens=tokens) for share, tokens in zip(given_shares, (2, 1, 1), strict=True)
        ]
    assert largest_distance(Mixture(targets(given_shares)), wanted, 3000) > 1
