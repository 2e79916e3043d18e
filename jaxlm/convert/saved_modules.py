"""Modules that are trained whole beside adapters (`lora.modules_to_save`), between layouts.

Their names are those of the modules outside the layers, in the live tree as in canonical names: `embed`, `head`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.convert.canonical import leaves
from jaxlm.convert.rows import Row
from jaxlm.errors import UserError
from jaxlm.models.lora import Tree


def to_layout(saved: Mapping[str, Any], rows: Sequence[Row], cfg: config.Model) -> dict[str, np.ndarray]:
    """The parameters of whole modules by the names of a layout."""
    known, found = leaves(cfg), {}
    for row in rows:
        parts = [name.partition(".") for name in row.ours]
        if all(module in saved for module, _, _ in parts):
            arrays = [np.asarray(saved[module][leaf]) for module, _, leaf in parts]
            stored = row.out(arrays, [known[name] for name in row.ours])
            found |= dict(zip(row.theirs, stored, strict=True))
    return found


def from_layout(tensors: Mapping[str, np.ndarray], rows: Sequence[Row], cfg: config.Model) -> Tree:
    """The whole modules among these tensors of a layout, as parts of the live tree.

    Raises:
        UserError: a tensor has another shape than the model's, or a module has not all of its tensors.
    """
    known: Any = leaves(cfg)
    tree: Tree = {}
    for row in rows:
        if row.ours[0].startswith("layers.") or not all(name in tensors for name in row.theirs):
            continue
        mine = [known[name] for name in row.ours]
        for name, shape in zip(row.theirs, row.shapes(mine), strict=True):
            if tensors[name].shape != shape:
                stated = f"{list(tensors[name].shape)}, the base has {list(shape)}"
                raise UserError(f"{name}: a module of shape {stated}", "it is of another model")
        ours = row.back([tensors[name] for name in row.theirs], mine)
        for name, array in zip(row.ours, ours, strict=True):
            module, _, leaf = name.partition(".")
            tree.setdefault(module, {})[leaf] = np.ascontiguousarray(array)
    for name in known:
        module, _, leaf = name.partition(".")
        if module in tree and leaf not in tree[module]:
            raise UserError(f"{name}: missing; a module of modules_to_save is stored whole", "it is of another model")
    return tree
