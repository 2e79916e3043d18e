"""Which tensor and which module of a model of transformers is which of torch_ref's.

Nothing is listed here: the rows of the family and the conversion that `save_pretrained` makes are run on tensors that
hold numbers instead of weights, and where a number comes out says where it belongs.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from jaxlm import config
from jaxlm.config.model_parts import MoE
from jaxlm.convert import native
from jaxlm.convert.canonical import leaves
from jaxlm.convert.rows import Row, expand, inputs, plan
from jaxlm.parity.trace import Arrays
from jaxlm.train.optim import DECAYED

OPAQUE = ("router", "head")
"""Modules whose outputs are not those of torch_ref: scores for a choice; logits, which have a name of their own."""
IN_A_STATE_SPACE = ("in_proj", "out_proj")
"""The modules inside of a state space whose outputs are compared: the others are called elsewhere or not at all."""


class Place(NamedTuple):
    """One module of torch_ref within a module of transformers."""

    name: str
    outputs: np.ndarray | None
    """Which of the outputs are its own, in its order; None: all, in their order."""
    inputs: np.ndarray | None
    gives: tuple[int, ...] = ()
    """The shape of the output for one token; () for whatever it is."""
    takes: tuple[int, ...] = ()
    """The shape of the input for one token."""


class Names:
    """The names of a loaded model; `rows` are those of its family for `cfg`."""

    def __init__(self, model: PreTrainedModel, cfg: config.Model, rows: Sequence[Row]) -> None:
        self._model, self._cfg, self._rows = model, cfg, expand(rows, cfg)
        self._names = [name for name, _ in model.state_dict().items()]
        self._owners = self._found_owners()

    def tensors(self, values: Mapping[str, Tensor]) -> Arrays:
        """Tensors by the names of the model in memory, by the names of torch_ref. All of them: rows join several."""
        # From memory to the published layout, which transformers itself does when it saves; from there to ours by the
        # rows of the family. No table of module names is written by hand.
        stored = revert_weight_conversion(self._model, dict(values))
        known, canonical = leaves(self._cfg), {}
        for row in self._rows:
            arrays = [exactly(stored[name]) for name in row.theirs]
            canonical |= dict(zip(row.ours, row.back(arrays, [known[name] for name in row.ours]), strict=True))
        native_rows = native.rows(self._cfg)
        return {one.name: np.asarray(one.make()) for one in plan(canonical, self._cfg, native_rows)}

    def decayed(self) -> set[str]:
        """The parameters in memory that decay."""
        kinds = {theirs: name.rpartition(".")[2] for name, theirs in self._canonical().items()}
        return {owner for name, owners in self._owners.items() if kinds[name] in DECAYED for owner in owners}

    def places(self) -> dict[str, list[Place]]:
        """The modules of torch_ref that each module in memory computes."""
        places: dict[str, list[Place]] = {}
        # Each weight is replaced by the number of its input, or output, channel. Where these numbers come out tells
        # which channel of torch_ref is which of transformers: reorderings are found and not assumed.
        taken = self._indices(1), self._indices(0)
        for canonical, name in self._canonical().items():
            found = self._leaf(canonical, name, *(index[name] for index in taken))
            if found is not None:
                places.setdefault(found[0], []).append(found[1])
        for name, module in self._parents().items():
            places.setdefault(module, []).append(Place(name, None, None))
        return places

    def routers(self) -> dict[str, tuple[str, MoE]]:
        """The router of each layer with experts: its name in memory to that of torch_ref, and its options."""
        found = {}
        for name, owners in self._owners.items():
            path = name.removesuffix(".weight")
            if path.endswith(".ffn.router"):
                kind = self._cfg.pattern[int(path.split(".")[1]) % len(self._cfg.pattern)]
                found[owners[0].rpartition(".")[0]] = path, self._cfg.halves(kind).ffn.moe
        return found

    def _canonical(self) -> dict[str, str]:
        """Our name to that of torch_ref."""
        return {row.ours[0]: row.theirs[0] for row in native.rows(self._cfg)}

    def _leaf(self, canonical: str, name: str, outputs: np.ndarray, taken: np.ndarray) -> tuple[str, Place] | None:
        """The module in memory that holds a weight, if its inputs and outputs are those of torch_ref."""
        path, _, kind = name.rpartition(".")
        last = path.rpartition(".")[2]
        owners = self._owners[name]
        # Several owners mean that one of our tensors is joined of several of theirs (or the other way round): then no
        # single module in memory computes what ours does.
        if kind != "weight" or last in OPAQUE or len(owners) > 1 or self._is_hidden(path):
            return None
        owner = owners[0].rpartition(".")[0]
        module, leaf = self._model.get_submodule(owner), leaves(self._cfg)[canonical]
        # A linear map: both its channels may be reordered. An embedding takes ids and gives channels in order. A
        # vector, of a norm, has one index for both.
        if isinstance(module, nn.Linear | Conv1D):
            gives, takes = leaf.shape[inputs(leaf) :], leaf.shape[: inputs(leaf)]
            return owner, Place(path, outputs[:, 0].astype(int), taken[0].astype(int), gives, takes)
        if isinstance(module, nn.Embedding):
            return owner, Place(path, None, None, leaf.shape[1:])
        if outputs.ndim == 1 and not isinstance(module, nn.Conv1d):
            return owner, Place(path, outputs.astype(int), outputs.astype(int))
        return None

    def _is_hidden(self, path: str) -> bool:
        parts = path.split(".")
        if parts[0] != "layers" or parts[2] != "mixer":
            return False
        kind = self._cfg.pattern[int(parts[1]) % len(self._cfg.pattern)]
        return self._cfg.halves(kind).mixer_name != "attention" and parts[3] not in IN_A_STATE_SPACE

    def _parents(self) -> dict[str, str]:
        """Blocks and their halves: the module that holds all parameters of one, and no others."""
        # A block in memory is the module that holds all the parameters of ours and no others. The deepest common path
        # finds it, without knowing what it is called.
        inside: dict[str, set[str]] = {}
        for name, owners in self._owners.items():
            parts = name.split(".")[:-1]
            for depth in range(2, len(parts)):
                if parts[0] == "layers" and parts[-1] not in OPAQUE:
                    inside.setdefault(".".join(parts[:depth]), set()).update(owners)
        found: dict[str, str] = {}
        for name, owners in inside.items():
            modules = ["/".join(owner.split(".")[:-1]) for owner in owners]
            common = os.path.commonpath(modules).replace("/", ".")
            if common and common != found.get(name.rpartition(".")[0]):
                found[name] = common
        return found

    def _found_owners(self) -> dict[str, list[str]]:
        """Which parameters in memory a tensor of torch_ref is made of."""
        state = self._model.state_dict()
        # Every parameter is filled with its own number and sent through the conversion: the numbers that come out in
        # one of our tensors name the parameters it is made of.
        numbers = {name: torch.full(state[name].shape, float(i)).double() for i, name in enumerate(self._names)}
        return {
            name: [self._names[int(number)] for number in np.unique(array)]
            for name, array in self.tensors(numbers).items()
        }

    def _indices(self, along: int) -> Arrays:
        """The number of an output (1) or an input (0) of a module in memory, at every place of torch_ref's tensors."""
        numbers = {}
        for name, tensor in self._model.state_dict().items():
            module = self._model.get_submodule(name.rpartition(".")[0])
            # Conv1D of transformers stores [inputs, outputs], Linear the transpose.
            axis = 0 if tensor.ndim < 2 or bool(along) != isinstance(module, Conv1D) else 1
            shape = [-1 if at == axis else 1 for at in range(tensor.ndim)]
            length = torch.arange(tensor.shape[axis] if tensor.ndim else 1).double()
            numbers[name] = length.reshape(shape).expand(tensor.shape).contiguous()
        return self.tensors(numbers)


def exactly(tensor: Tensor) -> np.ndarray:
    """The same bits in numpy."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
