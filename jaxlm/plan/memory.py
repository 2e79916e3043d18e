"""The memory of one device while it trains, counted from shapes and the layout alone: no compiler is asked.

The state is exact. What a step needs besides is what XLA's schedule keeps at its worst moment: gradients, what the
backward pass waits for, one block at work, gathered parameters, one block of logits.
"""

from __future__ import annotations

import dataclasses
import math

from jaxlm import config
from jaxlm.mesh import Layout
from jaxlm.models.activations import activations
from jaxlm.numerics import Policy
from jaxlm.plan.sharding import Sharding, describe


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. The first three are exact, the others estimates."""

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    """What the forward pass leaves for the backward pass."""
    working: int
    """One block at work, gathered parameters, logits."""

    @property
    def state(self) -> int:
        """What lies there between two steps, and the batch."""
        return self.parameters + self.optimizer + self.batch

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.state + self.gradients + self.activations + self.working


def estimate(cfg: config.Config, devices: int, slices: int = 1) -> Memory:
    """Count the memory of one of `devices`.

    Raises:
        UserError: the mesh does not fit the devices, or a size does not divide.
    """
    layout, held = Layout.abstract(cfg.mesh, devices, slices), describe(cfg, devices, slices)
    rows = (cfg.train.batch_size // cfg.train.microbatches, cfg.data.seq_len)
    layout.spec(("batch", "seq"), rows, "the rows of a microbatch")
    split, policy = layout.parts("batch") * layout.parts("seq"), Policy.from_config(cfg.numerics)
    parameters, narrow = held.bytes("parameter"), policy.compute.itemsize / policy.params.itemsize
    copies = int(parameters * narrow) if narrow < 1 else 0  # the scan takes them cast, all layers at once
    used = activations(cfg, layout)
    return Memory(
        parameters=parameters,
        optimizer=held.bytes("optimizer"),
        batch=5 * 4 * cfg.train.batch_size * cfg.data.seq_len // split,
        gradients=parameters * (1 if cfg.train.microbatches == 1 else 2) + copies,
        activations=used.kept,
        working=used.working + _gathered(held, narrow),
    )


def _gathered(held: Sharding, narrow: float) -> int:
    """Parameters that a device does not hold but computes with: those of one layer, and of the largest table.

    Each is there with its gradient before that is scattered again.
    """
    layers = outside = 0
    for leaf in held.leaves:
        if leaf.kind != "parameter":
            continue
        split = _over_batch(leaf.mesh_axes, held.mesh)
        size = int(leaf.local_bytes * split * narrow) if split > 1 else 0
        if leaf.name.startswith("layers."):
            layers += size // leaf.shape[0]
        else:
            outside = max(outside, size)
    return 2 * max(layers, outside)


def _over_batch(along: tuple[tuple[str, ...], ...], mesh: dict[str, int]) -> int:
    """Into how many parts a parameter is split along axes that also split the batch: it is gathered over these."""
    return math.prod(mesh[axis] for entry in along for axis in entry if axis in ("data", "fsdp", "context"))
