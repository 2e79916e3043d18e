"""Every bound of the parity suite, with the worst error measured and the reason. Never loosened to pass.

Those that `jaxlm parity` judges by are `jaxlm.parity.tolerances`.
"""

from __future__ import annotations

from jaxlm.parity.tolerances import COSINE64, FLOAT64, FLOORS, RATIO, Bound

COSINES = {
    "float32": Bound(1e-11, 2.7e-12, "1 - cos of a gradient against float64, after three layers of float32 rounding."),
    "bfloat16": Bound(5e-3, 1.7e-3, "1 - cos of a gradient against float64, after three layers of bfloat16 rounding."),
}

ATTENTION_KERNELS = Bound(2.0, 1.6, "Error of torch's fused attention over that of the reference in the same dtype.")
LLAMA = Bound(3e-6, 7.1e-7, "float32 against float32, three layers; an eps of 1e-5 for 1e-6 gives ten times as much.")
ORPO_FLOAT32 = Bound(1e-6, 1.3e-8, "TRL computes log odds in float32; ours are float64.")
AUTOCAST = Bound(3e-2, 1.2e-2, "bfloat16 products in two layers, relative to float32 logits.")
AUTOCAST_CURVE = Bound(3e-4, 1.1e-4, "Losses of 20 steps against float64; logits are rounded to bfloat16.")

__all__ = [
    "ATTENTION_KERNELS",
    "AUTOCAST",
    "AUTOCAST_CURVE",
    "COSINE64",
    "COSINES",
    "FLOAT64",
    "FLOORS",
    "LLAMA",
    "ORPO_FLOAT32",
    "RATIO",
    "Bound",
]
