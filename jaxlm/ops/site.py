"""Where an op computes: what it asks of the devices, handed in, since ops know no mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Site(NamedTuple):
    """The devices of a call."""

    platform: str
    """What is compiled for, `cpu`, `gpu` or `tpu`; the devices need not be here."""
    layout: Any = None
    """The `jaxlm.mesh.Layout` of more than one device, for kernels that XLA does not split."""
    over_sequence: Callable[..., Any] | None = None
    """`over_sequence(op, merged, q, k, v, places)`: `op(q, k, v, places, axis=...)` on each device's part of every row.
    `merged`: whether the op returns `Mixed`. None where nothing splits the sequence."""


def here() -> Site:
    """One device of this process's default platform."""
    return Site(jax.default_backend())
