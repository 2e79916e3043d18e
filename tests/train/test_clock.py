"""Where time goes, with a clock that the test turns."""

from __future__ import annotations

from jaxlm.run.clock import ASIDE, Clock, stragglers


class Hands:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time

    def go(self, seconds: float) -> None:
        self.time += seconds


def test_a_window_adds_up() -> None:
    hands = Hands()
    clock = Clock(hands, hands)
    with clock.spent("startup"):
        hands.go(10)
    with clock.spent("data_wait"):
        hands.go(1)
    hands.go(7)
    with clock.spent("checkpoint"):
        hands.go(2)
    window = clock.window()
    assert window.seconds == dict.fromkeys(ASIDE, 0) | {"compute": 7, "startup": 10, "data_wait": 1, "checkpoint": 2}
    assert (window.total, window.stepping, window.before_steps) == (20, 18, 3)
    assert window.goodput == 7 / 20
    hands.go(20)
    assert clock.window().goodput == 27 / 40


def test_rollouts_belong_to_their_steps() -> None:
    hands = Hands()
    clock = Clock(hands, hands)
    with clock.spent("rollouts"):
        hands.go(3)
    hands.go(1)
    with clock.spent("sampling"):
        hands.go(4)
    window = clock.window()
    assert (window.stepping, window.goodput) == (4, 4 / 8)


def test_goodput_over_a_crash() -> None:
    """Steps that were lost and the time in which nothing ran count against it."""
    hands = Hands()
    clock = Clock(hands, hands)
    hands.go(10)
    clock.window()
    saved = clock.state()
    hands.go(5)  # these steps are lost
    clock.window()
    hands.go(15)  # nothing runs
    again = Clock(hands, hands)
    again.resume(saved)
    hands.go(10)
    assert again.window().goodput == 20 / 40


def test_an_interrupted_kind_is_counted() -> None:
    hands = Hands()
    clock = Clock(hands, hands)
    try:
        with clock.spent("evaluation"):
            hands.go(3)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert clock.window().seconds["evaluation"] == 3


def test_stragglers() -> None:
    assert stragglers([0.1, 0.1, 4.0, 0.2], 10.0) == {2: 4.0}
    assert stragglers([1.0, 1.1, 1.2, 1.3], 10.0) == {}, "all wait for the same disk"
    assert stragglers([0.001, 0.001, 0.01], 10.0) == {}, "ten times as late as nothing is nothing"
    assert stragglers([0.1], 10.0) == {}
