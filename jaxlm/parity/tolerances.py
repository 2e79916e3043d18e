"""Every bound of the proof, for `jaxlm parity` and for the tests: what is allowed, what was measured, and why.

Never loosened to pass.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """The largest error allowed, and the largest measured (Linux x86-64, jax 0.10.2 and torch 2.13 on the CPU)."""

    allowed: float
    measured: float
    reason: str

    def check(self, error: float, what: str) -> None:
        """Raise AssertionError, naming `what`, unless `error` is a number within the bound."""
        assert error <= self.allowed, f"{what}: error {error:.3e} exceeds {self.allowed:.3e}"


FLOAT64 = Bound(
    1e-10,
    2.5e-12,
    "The same mathematics in another order of summation. The worst is the first update, where AdamW divides a gradient "
    "by its own size; values of the forward pass stay below 1e-14.",
)
COSINE64 = Bound(1e-20, 0.0, "1 - cos is half the square of a relative error, so FLOAT64 implies it.")
RATIO = Bound(
    2.0,
    0.0,
    "Each framework rounds at the same places, so neither may be twice as far from float64 as the other.",
)
FLOORS = {
    "float32": Bound(1e-6, 0.0, "Eight units of rounding: below this the ratio of two errors is luck."),
    "bfloat16": Bound(1e-2, 0.0, "Two and a half units of rounding."),
}
FLIPS = Bound(
    4.0,
    0.0,
    "Elements whose first AdamW update may go the other way: where a gradient is as small as its rounding, its sign is "
    "luck, and the update has full size all the same.",
)
ZERO_GRADIENT = Bound(
    1e-12,
    0.0,
    "A gradient this small against all together is zero in exact arithmetic (the bias of the keys without rotation: "
    "softmax ignores it). AdamW makes full-size updates of such noise, which are left out.",
)
