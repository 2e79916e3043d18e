"""Curricula: no row above the pace, every row offered by the end, and the order of a draw is its number's alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.curriculum import PACES, Curriculum, groups, square_root


def make(difficulty: np.ndarray, pace: str, start: float, steps: int, batch: int, seed: int = 0) -> Curriculum:
    first, pools = groups(steps, PACES[pace](start), len(difficulty))
    return Curriculum(difficulty, np.append(first, steps) * batch, pools, seed)


@settings(max_examples=40)
@given(
    st.lists(st.floats(0, 9), min_size=1, max_size=60),
    st.sampled_from(sorted(PACES)),
    st.floats(0.01, 1.0),
    st.integers(1, 40),
    st.integers(1, 9),
)
def test_no_row_above_the_pace_and_every_row_offered(difficulty, pace, start, steps, batch):
    order = make(np.array(difficulty), pace, start, steps, batch)
    rows = len(difficulty)
    drawn = order[np.arange(order.draws + 3)]
    rank = np.empty(rows, int)
    rank[order.easiest_first] = np.arange(rows)
    for step in range(steps):
        allowed = max(1, np.floor(PACES[pace](start)((step + 1) / steps) * rows + 1e-9))
        assert rank[drawn[step * batch : (step + 1) * batch]].max() < allowed
    assert set(drawn[: order.draws].tolist()) == set(range(rows))
    assert drawn[order.draws :].tolist() == [rows, rows + 1, rows + 2], "then the next epoch, from its first row"
    assert np.array_equal(np.array(difficulty)[order.easiest_first], np.sort(difficulty))


@pytest.mark.parametrize("pace", ["linear", "square_root"])
def test_a_curriculum_as_long_as_an_epoch_is_an_epoch(pace):
    """The original's hardest texts were never seen in under ten epochs (FEATURES S4-32)."""
    order = make(np.random.default_rng(1).random(800), pace, 0.1, 100, 8)
    assert sorted(order[np.arange(800)]) == list(range(800))
    assert order.draws == 800


def test_a_longer_one_offers_all_and_repeats_within_the_pool():
    order = make(np.random.default_rng(1).random(300), "square_root", 0.05, 200, 10)
    drawn = order[np.arange(2000)]
    assert set(drawn.tolist()) == set(range(300)) and order.draws == 2000


def test_a_shorter_one_offers_the_rest_before_it_repeats():
    order = make(np.arange(300.0), "linear", 0.1, 10, 10)
    drawn = order[np.arange(order.draws)]
    assert order.draws == 300 and sorted(drawn) == list(range(300))


def test_any_draw_alone_is_the_draw_among_others():
    difficulty = np.random.default_rng(3).random(200)
    together = make(difficulty, "linear", 0.1, 50, 8)[np.array([0, 399, 17, 450, 1000])]
    for place, draw in enumerate([0, 399, 17, 450, 1000]):
        assert make(difficulty, "linear", 0.1, 50, 8)[np.array([draw])][0] == together[place]
    other = make(difficulty, "linear", 0.1, 50, 8, seed=1)[np.arange(100)]
    assert not np.array_equal(other, make(difficulty, "linear", 0.1, 50, 8)[np.arange(100)])


def test_paces():
    assert square_root(0.1)(0.5) == pytest.approx(np.sqrt(0.5 * 0.99 + 0.01))
    for name, pace in PACES.items():
        values = [pace(0.2)(t) for t in np.linspace(0, 1, 21)]
        assert values[0] == pytest.approx(0.2) and values[-1] == 1.0, name
        assert np.all(np.diff(values) >= 0), name


def test_a_planted_fault_is_seen():
    """A pool that is the whole corpus from the start."""
    first, pools = groups(20, PACES["linear"](0.1), 100)
    order = Curriculum(np.arange(100.0), np.append(first, 20) * 5, np.full_like(pools, 100), 0)
    assert order[np.arange(5)].max() >= 0.145 * 100
