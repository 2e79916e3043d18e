"""Alarms below float64 about gradients and outputs are confirmed on other rows.

Luck passes, what rounds too often does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import pytest

from jaxlm.parity import second_look
from jaxlm.parity.compare import LOOKS, Finding
from jaxlm.parity.inputs import Inputs, make_inputs
from jaxlm.parity.second_look import MAJORITY, look_again, most_elements
from jaxlm.parity.sides.jax_side import JaxSide
from parity_tests import pairs

NAME = "layers.0.mixer.D"


class Noisy(JaxSide):
    """A side whose gradient or output has an error of this size, of each element or of four; nothing else is asked."""

    def __init__(self, size: float | np.ndarray, salt: int) -> None:
        self.name, self.size, self.salt, self.asked = "noisy", size, salt, 0

    def gradients(self, dtype: str, rows: Mapping[str, np.ndarray]) -> pairs.Arrays:
        self.asked += 1
        exact = np.ones(np.size(self.size) if np.ndim(self.size) else 4)
        seed = zlib.crc32(rows["tokens"].tobytes())
        noise = np.random.default_rng([seed, self.salt]).standard_normal(exact.size)
        return {NAME: exact if dtype == "float64" else exact + self.size * noise}

    forward = gradients


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(pairs.model())


def alarm(level: str = "gradients", error: float = 9e-5) -> Finding:
    return Finding("float32", level, NAME, error, 4e-5, errors=(2e-5, error))


@pytest.mark.parametrize("level", ["gradients", "forward"])
@pytest.mark.parametrize("salt", range(5))
def test_bad_luck_passes(inputs: Inputs, salt: int, level: str) -> None:
    (found,) = look_again("float32", [alarm(level)], inputs, (Noisy(3e-5, salt), Noisy(3e-5, 100 + salt)))
    assert found.level == level and found.ok and found.errors is not None
    assert found.bound == 2 * min(found.errors)
    assert "other draws" in found.note


@pytest.mark.parametrize("level", ["gradients", "forward"])
@pytest.mark.parametrize("salt", range(5))
def test_what_is_four_times_as_wrong_does_not(inputs: Inputs, salt: int, level: str) -> None:
    (found,) = look_again("float32", [alarm(level)], inputs, (Noisy(1.2e-4, salt), Noisy(3e-5, 100 + salt)))
    assert not found.ok and "other draws" in found.note


def test_what_is_surely_luck_takes_half_the_draws(inputs: Inputs) -> None:
    """Every draw keeps the bound: below the floor."""
    (found,) = look_again("float32", [alarm()], inputs, (Noisy(1e-8, 0), Noisy(1e-8, 1)))
    assert found.ok and found.note == f"nine of ten elements, the middle of {MAJORITY} other draws"


@pytest.mark.parametrize("size", [3e-5, 6e-5, 9e-5])
def test_draws_that_are_left_out_change_no_verdict(
    inputs: Inputs, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sides of which one rounds as much as, twice and three times as much as the other."""

    def judged() -> list[Finding]:
        pairs_of_sides = [(Noisy(size, salt), Noisy(3e-5, 100 + salt)) for salt in range(10)]
        return [found for sides in pairs_of_sides for found in look_again("float32", [alarm()], inputs, sides)]

    short = judged()
    monkeypatch.setattr(second_look, "MAJORITY", LOOKS + 1)
    whole = judged()
    assert all(f"middle of {LOOKS} other draws" in one.note for one in whole) and short != whole
    assert [one.ok for one in short] == [one.ok for one in whole]


@pytest.mark.parametrize(("wrong", "ok"), [(5, True), (20, False), (100, False)])
def test_what_rounds_too_often_does_so_in_more_than_a_few_elements(inputs: Inputs, wrong: int, ok: bool) -> None:
    """So many elements of a hundred are off by a hundred times of what the others are, on one side, on all rows."""
    size = np.full(100, 3e-5)
    size[:wrong] *= 100
    (found,) = look_again("float32", [alarm()], inputs, (Noisy(size, 1), Noisy(np.full(100, 3e-5), 2)))
    assert found.ok == ok and "other draws" in found.note, found


def test_a_gradient_that_is_mostly_zero_is_judged_by_the_rest() -> None:
    """An embedding of which few rows are used."""
    exact = np.zeros(1000)
    exact[:20] = 1
    assert most_elements(exact * (1 + 1e-4), exact) == pytest.approx(1e-4)


def test_nothing_else_is_judged_anew(inputs: Inputs) -> None:
    side = Noisy(3e-5, 0)
    before = [alarm("loss"), alarm(error=float("inf")), alarm(error=1e-5)]
    assert [*look_again("float32", before, inputs, (side, side))] == before
    assert side.asked == 0


def test_other_rows_are_other_rows(inputs: Inputs) -> None:
    one, two = inputs.other_rows(1), inputs.other_rows(2)
    assert not np.array_equal(one["tokens"], two["tokens"])
    for name in ("positions", "segments", "weights"):
        np.testing.assert_array_equal(one[name], inputs.rows[name])
