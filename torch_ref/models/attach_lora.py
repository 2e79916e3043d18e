"""Adapters of a decoder: put beside its linear maps, loaded by canonical names, merged. jaxlm has them as trees."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.adapter import Adapter, FourBits
from torch_ref.models.decoder import Decoder
from torch_ref.models.layers import Linear
from torch_ref.models.moe import ExpertLinear

BLOCK = 64


def sites(decoder: Decoder) -> dict[str, Linear | ExpertLinear]:
    """Every linear map of a model by its canonical name."""
    return {name: part for name, part in decoder.named_modules() if isinstance(part, Linear | ExpertLinear)}


def attach(decoder: Decoder, lora: config.LoRA) -> dict[str, nn.Parameter]:
    """Give the linear maps that `lora` names an adapter, and freeze all but these and `lora.modules_to_save`.

    Returns:
        What is trained, by name: `layers.0.mixer.q_proj.adapter.a`.

    Raises:
        UserError: a pattern or a name matches nothing.
    """
    decoder.requires_grad_(False)
    maps = sites(decoder)
    adapted = lora.adapted(maps)
    for name, part in maps.items():
        if name in adapted:
            *lead, outputs, inputs = part.weight.shape
            scale, rank = lora.scale_of(name), lora.rank_of(name)
            part.adapter = Adapter(tuple(lead), inputs, outputs, rank, scale, part.weight.dtype)
            part.adapter.dropout = lora.dropout
            if lora.dora:
                norm = part.weight.detach().double().square().sum(-1).sqrt()
                part.adapter.magnitude = nn.Parameter(norm.to(part.weight.dtype))
    outside = {name.split(".")[0] for name, _ in decoder.named_parameters()} - {"layers"}
    for name in lora.saved(outside):
        decoder.get_submodule(name).requires_grad_(True)
    return {name: value for name, value in decoder.named_parameters() if value.requires_grad}


def quantize(decoder: Decoder, *, double: bool) -> None:
    """Store the frozen weight of every linear map in four bits where its inputs fill blocks; experts stay."""
    for part in sites(decoder).values():
        if isinstance(part, Linear) and part.weight.shape[1] % BLOCK == 0:
            part.stored = FourBits(part.weight.detach().float(), double=double)
            del part.weight
            part.register_parameter("weight", None)


def moves(lora: config.LoRA) -> Callable[[str], bool]:
    """Whether a parameter, by its name, is one of an adapter or of a module that is trained whole."""
    return lora.trains


def load_base(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy the parameters under the adapters, by the names of a decoder without them."""
    own = {name: value for name, value in decoder.named_parameters() if ".adapter." not in name}
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def load(decoder: Decoder, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapters and whole modules, by the names of `attach`."""
    own = {name: value for name, value in decoder.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


@contextlib.contextmanager
def base_of(decoder: Decoder) -> Iterator[Decoder]:
    """The decoder without its adapters, while the context lasts."""
    parts = [(part, part.adapter) for part in sites(decoder).values()]
    try:
        for part, _ in parts:
            part.adapter = None
        yield decoder
    finally:
        for part, adapter in parts:
            part.adapter = adapter


@torch.no_grad()
def merge(decoder: Decoder) -> None:
    """Add every adapter to its weight, computed in float64 and rounded once, and take it away."""
    for part in sites(decoder).values():
        adapter = part.adapter
        if adapter is None:
            continue
        weight = part.weight if part.stored is None else part.stored.weight()
        whole = weight.double() + adapter.scale * (adapter.b.double() @ adapter.a.double())
        if adapter.magnitude is not None:
            whole = whole * (adapter.magnitude.double() / whole.square().sum(-1).sqrt()).unsqueeze(-1)
        part.weight = nn.Parameter(whole.to(weight.dtype), requires_grad=False)
        part.adapter = part.stored = None
