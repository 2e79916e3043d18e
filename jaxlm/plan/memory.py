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
import numpy as np

from jaxlm import config
from jaxlm.counts.activation_memory import EVERYTHING, Activations, Moving, activations
from jaxlm.mesh import Axes, Layout
from jaxlm.models.decoder import Decoder, abstract_params
from jaxlm.numerics import Policy, wide
from jaxlm.recipes import make_recipe
from jaxlm.train import adapters
from jaxlm.train.program import abstract_maps, stored_policy
from jaxlm.train.recipe import MODEL, Models, Recipe, Trained, parameter_name

Leaves = tuple[tuple[str, jax.ShapeDtypeStruct, Axes], ...]
"""Name, shape with dtype, and logical axes of each parameter of a tree."""


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


def estimate(cfg: config.Config, devices: int, slices: int = 1, recipe: Recipe | None = None) -> Memory:
    """Count the memory of one of `devices`.

    Args:
        recipe: of `cfg`, where the caller has made it; None: it is made here.

    Raises:
        UserError: the mesh does not fit the devices, a size does not divide, or the stage cannot be made.
    """
    # An abstract mesh: the rules of the real one, no devices behind it.
    layout, policy = Layout.abstract(cfg.mesh, devices, slices), Policy.from_config(cfg.numerics)
    # Only one microbatch is at work at a time; activations are those of its rows.
    size = cfg.train.batch_size, cfg.data.seq_len
    rows = (cfg.train.batch_size // cfg.train.microbatches, cfg.data.seq_len)
    layout.spec(("batch", "seq"), rows, "the rows of a microbatch")
    split = layout.parts("batch") * layout.parts("seq")
    # Layers stacked: shapes and axes are the same for any depth, and the count takes no time.
    model = dataclasses.replace(cfg.model, remat="none", layer_loop="scan")
    # AdamW keeps two moments of every parameter that moves, in its dtype; they may be split further than the parameters
    # (ZeRO-1).
    recipe = recipe or make_recipe(cfg)
    trained, frozen = stage_trees(recipe.models, policy)
    moving = sum(_bytes(layout, tree) for tree in trained)
    moments = 2 * sum(_bytes(layout.optimizer, tree) for tree in trained)
    leaves = _leaves(model, policy)
    narrow = policy.compute.itemsize / policy.params.itemsize
    copies = int(_bytes(layout, leaves) * narrow) if narrow < 1 else 0  # the scan takes them cast, all layers at once
    moving_of = {name: _moving(tree, policy) for name, tree in recipe.models.trained.items()}
    used = [_activations(cfg, tree, layout, recipe, moving_of[name]) for name, tree in recipe.models.trained.items()]
    narrow_width, wide_width = policy.compute.itemsize, wide(policy.compute).itemsize
    of_loss = math.prod(rows) // split * recipe.objective.kept * narrow_width
    layer, table = _gathered(layout, leaves, model.repeats)
    # of a layer: itself, the next one on its way, its gradient; of the table: itself, its gradient summed and cast
    of_layer = 3 if moving_of[MODEL].blocks else 2
    gathered = layer * of_layer * narrow_width + table * (2 * narrow_width + wide_width)
    # Microbatches keep a running sum of gradients beside those of the microbatch at work.
    columns = recipe.columns.values()
    batch = sum(math.prod(one.shape(*size)) * np.dtype(one.dtype).itemsize for one in columns)
    return Memory(
        parameters=moving + sum(_bytes(layout, tree) for tree in frozen),
        optimizer=moments,
        batch=batch // split,
        gradients=moving * (1 if cfg.train.microbatches == 1 else 2) + copies,
        activations=sum(one.kept + one.hidden for one in used) + of_loss,
        working=max(one.working for one in used) + gathered,
    )


def stage_trees(models: Models, policy: Policy) -> tuple[list[Leaves], list[Leaves]]:
    """The parameters that a stage moves, and those that only lie there.

    The latter are teachers, references, the base of adapters, and what the filter of a trained tree leaves where it is.

    Raises:
        UserError: the options of adapters match nothing of the model.
    """
    trained, frozen = [], []
    for tree in models.trained.values():
        if tree.adapters is None:
            leaves = _leaves(dataclasses.replace(tree.model, layer_loop="scan"), policy)
            moves = tree.moves or (lambda name: True)
            trained.append(tuple(leaf for leaf in leaves if moves(parameter_name(leaf[0]))))
            frozen.append(tuple(leaf for leaf in leaves if not moves(parameter_name(leaf[0]))))
            continue
        # As the model has its layers: adapters of some layers of a stack are refused there and not here.
        decoder = Decoder(tree.model, policy)
        trained.append(_flat(*adapters.abstract_trained(decoder, tree.adapters)))
        frozen.append(_flat(*adapters.abstract_base(decoder, tree.adapters)))
    trained += [_flat(*abstract_maps(tree, policy)) for tree in models.maps.values()]
    for tree in models.frozen.values():
        model = dataclasses.replace(tree.model, layer_loop="scan")
        frozen.append(_leaves(model, stored_policy(policy, tree.dtype)))
    return trained, frozen


def _activations(cfg: config.Config, tree: Trained, layout: Layout, recipe: Recipe, moving: Moving) -> Activations:
    # `cfg` says what is recomputed: a search asks about several choices with one recipe.
    model = dataclasses.replace(tree.model, remat=cfg.model.remat)
    return activations(dataclasses.replace(cfg, model=model), layout, recipe.objective.blocks, moving)


def _moving(tree: Trained, policy: Policy) -> Moving:
    """Where the parameters of a tree move."""
    if tree.moves is None or tree.adapters is not None:
        return EVERYTHING
    leaves = _leaves(dataclasses.replace(tree.model, layer_loop="scan"), policy)
    names = [*filter(tree.moves, (parameter_name(name) for name, *_ in leaves))]
    after = ("layers", "final_norm", "head", "score")
    return Moving(
        any(name.startswith("layers.") for name in names), any(name.partition(".")[0] not in after for name in names)
    )


@functools.lru_cache(maxsize=8)
def _leaves(model: config.Model, policy: Policy) -> Leaves:
    """Every parameter of a model, layers stacked."""
    return _flat(*abstract_params(Decoder(model, policy)))


def _flat(shapes: Any, axes: Any) -> Leaves:
    """Name, shape with dtype, and axes of the leaves of a tree."""
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat)
    return tuple(zip(names, (leaf for _, leaf in flat), tree.flatten_up_to(axes), strict=True))


def _bytes(layout: Layout, leaves: Leaves) -> int:
    """Bytes of a tree that a device holds."""
    return sum(_held(layout, name, leaf.shape, axes) * leaf.dtype.itemsize for name, leaf, axes in leaves)


def _held(layout: Layout, name: str, shape: tuple[int, ...], axes: Axes) -> int:
    """Elements of a parameter that a device holds."""
    layout.spec(axes, shape, name)
    return math.prod(shape) // math.prod(layout.parts(axis) for axis in axes)


def _gathered(layout: Layout, leaves: Leaves, repeats: int) -> tuple[int, int]:
    """Elements of one layer, and of the largest table, that a device computes with and does not hold."""
    layer = table = 0
    for name, leaf, axes in leaves:
        # Axes of data are gathered before use (ZeRO-3). Tensor and expert axes are not: there a device computes with
        # its own part.
        along = {one for axis in axes for one in layout.along(axis)} & {"data", "fsdp", "context"}
        split = math.prod(layout.mesh.shape[one] for one in along)
        size = split * _held(layout, name, leaf.shape, axes) if split > 1 else 0
        if name.startswith("layers."):
            layer += size // repeats
        else:
            table = max(table, size)
    return layer, table
