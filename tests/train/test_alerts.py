"""Red flags: seen, told once, and not told of what is usual."""

from __future__ import annotations

import numpy as np

from jaxlm.run.alerts import SILENT, Alerts


def told(losses: list[float], norms: list[float] | None = None) -> list[str]:
    alerts = Alerts()
    norms = norms or [1.0] * len(losses)
    return [
        line
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
        for line in alerts.look(step, {"loss": loss, "grad_norm": norm})
    ]


def test_a_spike_is_told_once() -> None:
    assert told([4.0] * 50 + [9.0] * 5 + [4.0] * 5) == ["step 51: loss 9, 2.2 times the median of the last steps"]
    assert len(told([4.0] * 50 + ([9.0] + [4.0] * SILENT) * 5)) == 1, "not every hundred steps"
    worse = told([4.0] * 50 + [9.0] + [4.0] * 10 + [18.5] + [4.0] * SILENT + [18.5])
    assert [line.split(",")[1].split(" times")[0] for line in worse] == [" 2.2", " 4.6"]


def test_a_large_gradient_is_told() -> None:
    assert told([4.0] * 30, [0.5] * 29 + [50.0]) == ["step 30: grad_norm 50, 100.0 times the median of the last steps"]


def test_a_step_without_a_gradient_silences_nothing() -> None:
    assert len(told([4.0] * 42, [1.0] * 30 + [0.0] + [1.0] * 10 + [1e6])) == 1


def test_what_is_usual_is_not_told() -> None:
    falling = [10 - 0.1 * step for step in range(60)]
    assert told(falling) == []
    assert told([1.0] * 5 + [100.0] + [1.0] * 5) == [], "too early to know what is usual"
    assert told([-0.1] * 30 + [0.1] * 30) == [], "a loss around 0 has no factor"
    assert told([0.002, 0.003, -0.001] * 20 + [0.02] * 3) == [], "nor has one whose median happens to be above 0"
    assert told([4.0] * 30 + [float("nan"), float("inf")]) == [], "the guard speaks of these"


def of_samples(lengths: list[float], ended: list[float]) -> list[str]:
    alerts = Alerts(ends=[2, 7])
    return [
        line
        for step, (length, share) in enumerate(zip(lengths, ended, strict=True), 1)
        for line in alerts.look(step, {"loss": 0.0, "grad_norm": 1.0, "length": length, "ended": share})
    ]


def test_samples_that_do_not_end_are_told_with_the_ids() -> None:
    lines = of_samples([8.0] * 120, [0.0] * 120)
    assert lines == ["step 50: no sample has ended for 50 steps; the ids that end one: 2, 7"]
    assert of_samples([8.0] * 120, ([0.0] * 49 + [0.1]) * 2 + [0.0] * 20) == []


def test_samples_that_grow_are_told() -> None:
    lines = of_samples([3.0] * 6 + [3.0 + 0.3 * step for step in range(14)], [0.9] * 20)
    assert len(lines) == 1 and lines[0].startswith(
        "step 14: samples have grown from 3.0 to 4.8 tokens, 90% of them end"
    )
    assert of_samples([3.0, 4.0] * 20, [0.9] * 40) == []
    (line,) = of_samples([2.0, 5.4, 6.0] + [6.0] * 20, [0.0] * 23)
    assert line.startswith("step 6: samples have grown from 2.0 to 6.0 tokens"), "found within two updates"


def of_phases(lengths: list[float], correlation: float, updates: int = 1) -> list[str]:
    alerts = Alerts(updates_per_phase=updates)
    usual = {"loss": 0.0, "grad_norm": 1.0, "ended": 1.0, "length_correlation": correlation}
    steps = [length for length in lengths for _ in range(updates)]
    return [line for step, length in enumerate(steps, 1) for line in alerts.look(step, usual | {"length": length})]


def test_samples_that_grow_by_their_rewards_are_told_sooner() -> None:
    slow = [5.0, 5.02, 4.99, 5.01, 5.0, 5.03, *(5.0 + 0.1 * step for step in range(20))]
    (line,) = of_phases(slow, 0.9)
    assert line.startswith("step 14: samples have grown from 5.0 to 5.6 tokens, the longer the larger their rewards")
    assert of_phases(slow, 0.3) == [], "1.4 times their length: the reward does not pay for it"
    (line,) = of_phases(slow, 0.9, updates=4)
    assert line.startswith("step 53:"), "the same phase, its first update"


def test_lengths_that_differ_by_chance_are_not_told() -> None:
    """Few samples of prompts that ask for answers of different length: three phases are often a tenth longer."""
    random = np.random.default_rng(0)
    for _ in range(20):
        lengths = [20 * float(np.exp(random.normal(0, 0.5, 16)).mean()) for _ in range(200)]
        assert of_phases(lengths, 0.9) == []
