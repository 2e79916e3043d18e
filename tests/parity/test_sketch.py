"""Sketches estimate the length of a difference, and are the same numbers everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxlm.parity.golden.projection import CHUNK, PROJECTIONS, Sketch, distance, relative_distance, sketch


def test_the_estimate_is_distributed_like_chi_square(rng: np.random.Generator) -> None:
    then = rng.standard_normal(300)
    before, ratios = sketch(then), []
    for _ in range(2000):
        change = 1e-7 * rng.standard_normal(300)
        ratios.append((distance(before, sketch(then + change)) / np.linalg.norm(change)) ** 2)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    # chi-square with 16 degrees of freedom over 16, at 0.1 %, 50 % and 99.9 %
    assert np.quantile(ratios, [0.001, 0.5, 0.999]) == pytest.approx([0.246, 0.959, 2.453], rel=0.2)


@pytest.mark.parametrize("size", [20, 300, CHUNK + 5, 3 * CHUNK])
def test_an_error_of_a_billionth_is_seen_and_rounding_is_not(size: int, rng: np.random.Generator) -> None:
    then = rng.standard_normal(size)
    for changed in (1, 2, size):
        change = np.zeros(size)
        change[rng.permutation(size)[:changed]] = 1.0
        change[np.flatnonzero(change)[::2]] *= -1  # two values that have changed places
        now = then + 1e-9 * np.linalg.norm(then) * change / np.linalg.norm(change)
        assert relative_distance(sketch(then), sketch(now)) > 1e-10
    assert relative_distance(sketch(then), sketch(then * (1 + 4e-16))) < 1e-14


@pytest.mark.parametrize("shape", [(), (3,), (2, 8)])
def test_few_elements_are_kept_as_they_are(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    then, now = (np.asarray(rng.standard_normal(shape)) for _ in range(2))
    assert distance(sketch(then), sketch(now)) == pytest.approx(float(np.linalg.norm(then - now)), rel=1e-15)
    assert math.isnan(distance(sketch(then), sketch(np.full(shape, np.nan))))


def test_nothing_is_relative_to_zero() -> None:
    zero = sketch(np.zeros(100))
    assert relative_distance(zero, zero) == 0
    assert relative_distance(zero, sketch(np.ones(100))) > 1
    assert relative_distance(zero, sketch(np.ones(100)), scale=1e6) < 1e-3


def test_the_projections_are_those_of_every_machine() -> None:
    """A golden file outlives versions of numpy: these numbers stand for good."""
    found = sketch(np.arange(CHUNK + 100.0))
    assert found == Sketch((CHUNK + 100,), found.norm, FROZEN)
    assert len(FROZEN) == PROJECTIONS


FROZEN = (
    *(-585089.0, 324054.0, -1333932.0, -668202.0, -638390.0, 205275.0, 1448664.0, -275743.0),
    *(7886.0, -473551.0, 117477.0, 396739.0, -249711.0, 752909.0, 530008.0, -31996.0),
)
