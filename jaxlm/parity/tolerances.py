"""The bounds of the proof, for `jaxlm parity` and for the tests: what is allowed, what was measured, and why.

In float64 the relative difference of two frameworks is at most `FLOAT64`, 1e-10. In float32 and bfloat16 both have an
error against float64, and the larger one is at most `RATIO`, 2, times max(the smaller one, the floor). The floor is
4 * 2^-23 in float32 and 4 * 2^-8 in bfloat16, so an error of up to twice the floor always passes. Never loosened to
pass.
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
    2.9e-12,
    "Different mathematics shows far above this, float64 rounding far below: 9e-15 for all but the gradient of a key "
    "bias that is zero in exact arithmetic, whose noise is measured against 1e-5 of the whole gradient.",
)
COSINE64 = Bound(1e-20, 5.8e-29, "1 - cos is half the square of the relative error, so this is FLOAT64 squared.")

RATIO = Bound(
    2.0,
    1.9,
    "Error of one framework against float64 over that of the other; both round at the same places, in another order. "
    "1.5 in 50 random models, but for one gradient of ten elements. "
    "Gradients that are zero in exact arithmetic are left out: their noise has no size to be relative to.",
)
FLOORS = {
    "float32": Bound(4 * 2**-23, 0.0, "Four roundings, after a chain of some hundred: smaller errors say nothing."),
    "bfloat16": Bound(4 * 2**-8, 0.0, "The same. A floor is only ever a divisor, so nothing is measured against it."),
}
PARAMETER_ROUNDING = Bound(
    2**-24,
    1.8e-8,
    "Error of a float32 parameter after one update, against its size: half a rounding unit. It may not average out: "
    "torch multiplies by 1 - lr * decay, rounded the same way in every step, where optax adds -lr * decay * p.",
)
ZERO_GRADIENT = Bound(
    1e-12,
    2.5e-17,
    "A gradient this small against all together is zero in exact arithmetic (the bias of the keys without rotation: "
    "softmax ignores it). AdamW makes full-size updates of such noise, so they are left out.",
)
