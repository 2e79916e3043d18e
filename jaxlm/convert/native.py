"""jaxlm <-> torch_ref: the same names and one rule instead of a table.

A kernel [in..., out...] is a weight [out, in], an embedding or a norm scale is a weight as it is, a bias is flat; every
other parameter has one name and one shape.
"""

from __future__ import annotations

import dataclasses
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


def from_torch(tensors: Mapping[str, np.ndarray], cfg: config.Model, where: str = "tensors") -> Params:
    """The live tree of `cfg` from a torch_ref `state_dict` of numpy arrays; the inverse of `to_torch`.

    Raises:
        UserError: one line with every missing, unexpected, mis-shaped, non-float or non-finite tensor.
    """
    return from_layout(tensors, cfg, rows(cfg), where)


def scored_to_torch(params: Params, cfg: config.Model) -> Iterator[tuple[str, np.ndarray]]:
    """As `to_torch`, for the models of `models.heads`: the trunk by its rows, then the score.

    Raises:
        UserError: the tree of the trunk is not that of `cfg`.
    """
    yield from to_torch({name: leaf for name, leaf in params.items() if name != "score"}, _trunk(cfg))
    yield "score.weight", np.asarray(params["score"]["kernel"]).T
    yield "score.bias", np.asarray(params["score"]["bias"])


def scored_from_torch(tensors: Mapping[str, np.ndarray], cfg: config.Model, where: str = "tensors") -> Params:
    """The live tree of a model of `models.heads`; the inverse of `scored_to_torch`.

    Raises:
        UserError: as `from_torch`, or the score is missing or not of the model's width.
    """
    weight, bias = (tensors.get(f"score.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None or weight.shape != (*bias.shape, cfg.d_model):
        raise UserError(f"{where}: no score.weight [outputs, {cfg.d_model}] with a score.bias [outputs]")
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith("score.")}
    score = {"kernel": np.ascontiguousarray(weight.T), "bias": np.asarray(bias)}
    return from_torch(trunk, _trunk(cfg), where) | {"score": score}


def _trunk(cfg: config.Model) -> config.Model:
    """The same model without an output matrix of its own."""
    biases = tuple(name for name in cfg.biases if name != "head")
    return dataclasses.replace(cfg, tie_embeddings=True, biases=biases)
