"""Every bound of the parity suite, with the worst error measured and the reason. Never loosened to pass."""

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
    1.66,
    "Error of one framework against float64 over that of the other; both round at the same places, in another order. "
    "Gradients that are zero in exact arithmetic are left out: their noise has no size to be relative to.",
)
FLOORS = {
    "float32": Bound(4 * 2**-23, 0.0, "Four roundings, after a chain of some hundred: smaller errors say nothing."),
    "bfloat16": Bound(4 * 2**-8, 0.0, "The same. A floor is only ever a divisor, so nothing is measured against it."),
}
COSINES = {
    "float32": Bound(1e-11, 2.7e-12, "1 - cos of a gradient against float64, after three layers of float32 rounding."),
    "bfloat16": Bound(5e-3, 1.7e-3, "1 - cos of a gradient against float64, after three layers of bfloat16 rounding."),
}

ATTENTION_KERNELS = Bound(2.0, 1.6, "Error of torch's fused attention over that of the reference in the same dtype.")
LLAMA = Bound(3e-6, 7.1e-7, "float32 against float32, three layers; an eps of 1e-5 for 1e-6 gives ten times as much.")
AUTOCAST = Bound(3e-2, 1.2e-2, "bfloat16 products in two layers, relative to float32 logits.")
AUTOCAST_CURVE = Bound(3e-4, 8.7e-5, "Losses of 20 steps against float64; logits are rounded to bfloat16.")
