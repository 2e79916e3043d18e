"""Experts, state spaces and sinks in float32 and bfloat16: neither framework is more than twice as wrong as the other.

Many of their parameters are small (a number for each head or expert), and the error of a few elements is a matter of
luck. So errors are medians over several draws of rows.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from parity_tests import pairs
from parity_tests.test_logits_gradients import errors
from parity_tests.tolerances import FLOORS, RATIO

DRAWS, T = 6, 160
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "moe": {
        "pattern": ("attention+moe",),
        "moe": {"n_shared": 1, "router": "sigmoid", "z_loss": 1e-2},
        "activation": "swiglu_clamped",
    },
    "mamba": {"pattern": ("mamba",), "mamba": {"dt_rank": 16, "inner_norms": True}},
    "mamba2 and sinks": {
        "pattern": ("mamba2", "attention(window=40, keep_first=3, sink_logits=true, sink_tokens=2, softcap=4.0)+mlp"),
        "mamba": {"d_state": 16, "head_dim": 4},
        "n_heads": 16,
        "n_kv_heads": 8,
        "head_dim": 4,
    },
}


def errors_of_both(options: dict[str, Any], compute: str) -> dict[str, tuple[float, float]]:
    """Medians, over the draws, of the errors of torch_ref and jaxlm against float64, by tensor."""
    cfg = pairs.model(n_layers=2, **options)
    values = pairs.random_params(cfg, np.random.default_rng(1))
    exact, narrow = pairs.pair(cfg, values), pairs.pair(cfg, values, "float32", compute)
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for draw in range(DRAWS):
        batch = pairs.packed_batch(cfg, np.random.default_rng([draw, 2]), T)
        golden = pairs.run_jax(exact.jax, exact.params, batch)
        ours = dict(errors(pairs.run_torch(narrow.torch, batch), golden))
        theirs = dict(errors(pairs.run_jax(narrow.jax, narrow.params, batch), golden))
        for tensor, (distance, _) in ours.items():
            seen[tensor].append((distance, theirs[tensor][0]))
    return {tensor: tuple(np.median(both, axis=0).tolist()) for tensor, both in seen.items()}


@pytest.mark.parametrize("compute", FLOORS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_narrow_errors_are_alike(name: str, compute: str) -> None:
    for tensor, both in errors_of_both(ARCHITECTURES[name], compute).items():
        low, high = sorted(both)
        RATIO.check(
            high / max(low, FLOORS[compute].allowed), f"{compute} {tensor}: {both[0]:.2e}, {both[1]:.2e}, ratio"
        )
