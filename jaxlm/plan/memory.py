"""The memory of one device while it trains, counted from shapes and the layout alone: no compiler is asked.

The state is exact. What a step needs besides is what XLA's schedule keeps at its worst moment: gradients, what the
backward pass waits for, gathered parameters, one block at work or a block of logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax

from jaxlm import config
from jaxlm.counts.activation_memory import activations
from jaxlm.mesh import Axes, Layout
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy, wide


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
    """One block at work or a block of logits, and gathered parameters."""

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
    # An abstract mesh: the rules of the real one, no devices behind it.
    layout, policy = Layout.abstract(cfg.mesh, devices, slices), Policy.from_config(cfg.numerics)
    # Only one microbatch is at work at a time; activations are those of its rows.
    rows = (cfg.train.batch_size // cfg.train.microbatches, cfg.data.seq_len)
    layout.spec(("batch", "seq"), rows, "the rows of a microbatch")
    split = layout.parts("batch") * layout.parts("seq")
    # Layers stacked: shapes and axes are the same for any depth, and the count takes no time.
    model = dataclasses.replace(cfg.model, remat="none", layer_loop="scan")
    # AdamW keeps two moments of every parameter, in the dtype of the parameters; they may be split further than these
    # (ZeRO-1).
    leaves = [(name, leaf.shape, axes) for name, leaf, axes in _leaves(model, policy)]
    parameters = sum(_held(layout, *leaf) for leaf in leaves) * policy.params.itemsize
    moments = 2 * sum(_held(layout.optimizer, *leaf) for leaf in leaves) * policy.params.itemsize
    narrow = policy.compute.itemsize / policy.params.itemsize
    copies = int(parameters * narrow) if narrow < 1 else 0  # the scan takes them cast, all layers at once
    used = activations(cfg, layout)
    layer, table = _gathered(layout, leaves, model.repeats)
    # of a layer: itself, the next one on its way, its gradient; of the table: itself, its gradient summed and cast
    narrow_width, wide_width = policy.compute.itemsize, wide(policy.compute).itemsize
    gathered = layer * 3 * narrow_width + table * (2 * narrow_width + wide_width)
    # Microbatches keep a running sum of gradients beside those of the microbatch at work. A batch has five columns of
    # four bytes a token.
    return Memory(
        parameters=parameters,
        optimizer=moments,
        batch=5 * 4 * cfg.train.batch_size * cfg.data.seq_len // split,
        gradients=parameters * (1 if cfg.train.microbatches == 1 else 2) + copies,
        activations=used.kept,
        working=used.working + gathered,
    )


@functools.lru_cache(maxsize=8)
def _leaves(model: config.Model, policy: Policy) -> tuple[tuple[str, Any, Axes], ...]:
    """Name, shape and axes of every parameter, layers stacked."""
    shapes, axes = abstract_params(Decoder(model, policy))
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat)
    return tuple(zip(names, (leaf for _, leaf in flat), tree.flatten_up_to(axes), strict=True))


def _held(layout: Layout, name: str, shape: tuple[int, ...], axes: Axes) -> int:
    """Elements of a parameter that a device holds."""
    layout.spec(axes, shape, name)
    return math.prod(shape) // math.prod(layout.parts(axis) for axis in axes)


def _gathered(layout: Layout, leaves: list[tuple[str, tuple[int, ...], Axes]], repeats: int) -> tuple[int, int]:
    """Elements of one layer, and of the largest table, that a device computes with and does not hold."""
    layer = table = 0
    for name, shape, axes in leaves:
        # Axes of data are gathered before use (ZeRO-3). Tensor and expert axes are not: there a device computes with
        # its own part.
        along = {one for axis in axes for one in layout.along(axis)} & {"data", "fsdp", "context"}
        split = math.prod(layout.mesh.shape[one] for one in along)
        size = split * _held(layout, name, shape, axes) if split > 1 else 0
        if name.startswith("layers."):
            layer += size // repeats
        else:
            table = max(table, size)
    return layer, table
