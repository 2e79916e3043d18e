"""jaxlm <-> torch_ref: the same names and one rule instead of a table.

A kernel [in..., out...] is a weight [out, in], an embedding or a norm scale is a weight as it is, a bias is flat; every
other parameter has one name and one shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from jaxlm import config
from jaxlm.convert.canonical import leaves
from jaxlm.convert.rows import Row, Transform, flat, from_layout, matrix, to_layout
from jaxlm.errors import UserError
from jaxlm.models.decoder import Params

RULE: Mapping[str, tuple[str, tuple[Transform, ...]]] = {
    "kernel": ("weight", (matrix,)),
    "embedding": ("weight", ()),
    "scale": ("weight", ()),
    "bias": ("bias", (flat,)),
}


def rows(cfg: config.Model) -> list[Row]:
    """The rule applied to every parameter of a model: `mixer.q_proj.kernel` is `mixer.q_proj.weight`, transposed."""
    found = []
    for name in leaves(cfg):
        module, _, kind = name.rpartition(".")
        theirs, transforms = RULE.get(kind, (kind, ()))
        found.append(Row(name, f"{module}.{theirs}", *transforms))
    return found


def to_torch(params: Params, cfg: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Every entry of the `state_dict` of `torch_ref.models.decoder.Decoder(cfg)`, one at a time, bit for bit.

    Raises:
        UserError: the tree is not that of `cfg`.
    """
    return to_layout(params, cfg, rows(cfg))


def maps_to_torch(maps: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The `state_dict` of linear maps that are no model: see `train.recipe.Maps`."""
    for name, leaves_of_map in maps.items():
        yield f"{name}.weight", np.ascontiguousarray(np.asarray(leaves_of_map["kernel"]).T)


def maps_from_torch(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, int]], where: str) -> Params:
    """The inverse of `maps_to_torch`, for maps of these inputs and outputs.

    Raises:
        UserError: a tensor is missing, unexpected or mis-shaped.
    """
    wanted = {f"{name}.weight": [outputs, inputs] for name, (inputs, outputs) in shapes.items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        have = list(tensors[name].shape) if name in tensors else "absent"
        if have != wanted.get(name, "absent"):
            raise UserError(f"{where}: {name} is {have}, the config asks for {wanted.get(name, 'absent')}")
    return {name: {"kernel": np.ascontiguousarray(tensors[f"{name}.weight"].T)} for name in shapes}


def from_torch(tensors: Mapping[str, np.ndarray], cfg: config.Model, where: str = "tensors") -> Params:
    """The live tree of `cfg` from a torch_ref `state_dict` of numpy arrays; the inverse of `to_torch`.

    Raises:
        UserError: one line with every missing, unexpected, mis-shaped, non-float or non-finite tensor.
    """
    return from_layout(tensors, cfg, rows(cfg), where)
