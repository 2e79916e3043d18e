"""Red flags: seen, told once, and not told of what is usual."""

from __future__ import annotations

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
    assert len(told([4.0] * 50 + [9.0] + [4.0] * SILENT + [9.0])) == 2


def test_a_large_gradient_is_told() -> None:
    assert told([4.0] * 30, [0.5] * 29 + [50.0]) == ["step 30: grad_norm 50, 100.0 times the median of the last steps"]


def test_what_is_usual_is_not_told() -> None:
    falling = [10 - 0.1 * step for step in range(60)]
    assert told(falling) == []
    assert told([1.0] * 5 + [100.0] + [1.0] * 5) == [], "too early to know what is usual"
    assert told([4.0] * 30 + [float("nan"), float("inf")]) == [], "the guard speaks of these"
