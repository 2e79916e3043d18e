"""The peak of a machine is the best of shapes and libraries, and is found once."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.run import peak


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only products advance."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_the_best_of_shapes_is_kept(tmp_path: Path, clock: list[float]) -> None:
    """A product takes 1 s but for one shape, in which it takes half: that shape's FLOP/s are the peak, also later."""
    calls: list[tuple[int, int, int]] = []

    def multiply(a: np.ndarray, b: np.ndarray) -> Any:
        shape = (*a.shape, b.shape[1])

        def product() -> None:
            calls.append(shape)
            clock[0] += 0.5 if shape == peak.SHAPES[-1] else 1.0

        return product

    expected = 2 * math.prod(peak.SHAPES[-1]) / 0.5
    assert peak.peak_flops(tmp_path / "new", "chip", "one 1.0", multiply, 0.0) == expected
    assert {*calls} == {*peak.SHAPES}
    calls.clear()
    assert peak.peak_flops(tmp_path / "new", "chip", "one 1.0", multiply, 0.0) == expected
    assert not calls

    slower = lambda a, b: lambda: clock.__setitem__(0, clock[0] + 100)  # noqa: E731
    assert peak.peak_flops(tmp_path / "new", "chip", "two 2.0", slower, 0.0) == expected  # one figure for both
    assert json.loads((tmp_path / "new" / "peak_flops.json").read_text())["chip"].keys() == {"one 1.0", "two 2.0"}


def test_a_broken_record_is_made_anew(tmp_path: Path, clock: list[float]) -> None:
    (tmp_path / "peak_flops.json").write_text("{")
    one = lambda a, b: lambda: clock.__setitem__(0, clock[0] + 1)  # noqa: E731
    assert peak.peak_flops(tmp_path, "chip", "one", one, 0.0) == max(2 * m * k * n for m, k, n in peak.SHAPES)
    assert json.loads((tmp_path / "peak_flops.json").read_text())


def test_what_a_run_reached_shows_that_the_peak_was_measured_on_a_busy_machine(
    tmp_path: Path, clock: list[float]
) -> None:
    """A busy machine takes 100 s for a product. A run is faster than that, so the peak is measured anew, and kept."""
    takes = [100.0]
    multiply = lambda a, b: lambda: clock.__setitem__(0, clock[0] + takes[0])  # noqa: E731
    busy = peak.peak_flops(tmp_path, "chip", "one", multiply, 0.0)
    assert peak.peak_flops(tmp_path, "chip", "one", multiply, 2 * busy) == 2 * busy  # still busy: what is known
    takes[0] = 1.0
    assert peak.peak_flops(tmp_path, "chip", "one", multiply, 3 * busy) == 100 * busy
    assert peak.peak_flops(tmp_path, "chip", "two", multiply, 0.0) == 100 * busy
