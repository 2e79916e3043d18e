"""Adapters as trees: which linear maps have one, their first values, their scales, and the merged base.

The formulas stand in `models/adapted.py`. Scale: alpha / r (LoRA), alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).

An adapter lives in the collection `adapters` under the path of the kernel that it adapts: `a` [in..., r], `b`
[r, out...] and, for DoRA, `magnitude` [out...]. Its scale lies beside it in the collection `adapter_scale`, which is
not trained. B is zero at first, so that the first forward pass is the base's bit for bit.

Shapes: r rank, R repeats of a scanned pattern, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.mesh import Axes
from jaxlm.models.decoder import Decoder, abstract_params, trace_modules
from jaxlm.models.layers import Linear
from jaxlm.models.moe import ExpertLinear

Tree = dict[str, Any]


class Site(NamedTuple):
    """A linear map that can have an adapter."""

    path: tuple[str, ...]
    """Of its module in the live tree; `layers.slot_0.mixer.q_proj` when the layers are scanned."""
    names: tuple[str, ...]
    """Canonical names of its modules: one, or one for each repeat."""
    shape: tuple[int, ...]
    """Of the kernel."""
    axes: Axes
    stacked: int
    """Leading axes that count repeats and experts."""
    inputs: int
    """Axes of the input behind them."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return self.shape[: self.stacked]

    @property
    def ins(self) -> tuple[int, ...]:
        """Sizes of the axes of the input."""
        return self.shape[self.stacked : self.stacked + self.inputs]

    @property
    def outs(self) -> tuple[int, ...]:
        """Sizes of the axes of the output."""
        return self.shape[self.stacked + self.inputs :]

    def axes_of(self, name: str) -> Axes:
        """Logical axes of `a`, `b`, `magnitude` or `scale`."""
        lead, rest = self.axes[: self.stacked], self.axes[self.stacked :]
        ins, outs = rest[: self.inputs], rest[self.inputs :]
        repeats = tuple(axis for axis in lead if axis == "layers")
        return {"a": (*lead, *ins, None), "b": (*lead, None, *outs), "magnitude": (*lead, *outs), "scale": repeats}[
            name
        ]


def sites(decoder: Decoder) -> list[Site]:
    """Every linear map of a model, in the order of its live tree."""
    cfg, inputs = decoder.config, _inputs(decoder)  # pyright: ignore[reportArgumentType]  (a module is hashable)
    shapes, axes = abstract_params(decoder)
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        keys = tuple(key.key for key in path)
        name = _canonical(keys[:-1], cfg)
        if keys[-1] != "kernel" or _slot(name[0], cfg) not in inputs:
            continue
        named = _leaf(axes, keys[:-1])["kernel"]
        stacked = sum(axis in ("layers", "experts") for axis in named)
        found.append(Site(keys[:-1], name, leaf.shape, named, stacked, inputs[_slot(name[0], cfg)]))
    return found


@functools.lru_cache(maxsize=64)
def _inputs(decoder: Decoder) -> dict[str, int]:
    """Axes of the input of each linear map, by slot of the pattern and path within a block: one repeat is traced."""
    found: dict[str, int] = {}

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, Linear):
            found[".".join(module.path[1:]).removeprefix("slot_")] = module.n_in
        elif isinstance(module, ExpertLinear):
            found[".".join(module.path[1:]).removeprefix("slot_")] = 1
        return call(*args, **kwargs)

    scanned = dataclasses.replace(decoder.config, layer_loop="scan")
    with nn.intercept_methods(look):
        trace_modules(decoder.clone(config=scanned))
    return found


def _slot(name: str, cfg: config.Model) -> str:
    """`layers.7.mixer.q_proj` as `1.mixer.q_proj`, for a pattern of two blocks."""
    first, _, inside = name.removeprefix("layers.").partition(".")
    return f"{int(first) % len(cfg.pattern)}.{inside}" if first.isdecimal() else name


def chosen(all_sites: Sequence[Site], lora: config.LoRA) -> list[Site]:
    """The linear maps that `lora.targets` names.

    Raises:
        UserError: a pattern matches nothing, or only some of the layers of a stack.
    """
    adapted, found = lora.adapted(name for site in all_sites for name in site.names), []
    for site in all_sites:
        hits = [name in adapted for name in site.names]
        if any(hits) and not all(hits):
            where = site.names[hits.index(False)]
            raise UserError(
                f"lora.targets leave out {where} of a stack", 'model.layer_loop = "unroll" takes any layers'
            )
        if any(hits):
            found.append(site)
    return found


def init(targets: Sequence[Site], lora: config.LoRA, seed: int, dtype: Any, params: Tree | None = None) -> Tree:
    """New adapters: A even within 1 / sqrt(in) as in PEFT, B zero, the magnitude of DoRA that of `params`.

    The values depend on the seed and the canonical name alone: scanned or not, on any mesh, in both frameworks.

    Raises:
        UserError: a rank is above what the matrix has.
    """
    tree: Tree = {}
    for site in targets:
        rank = _rank(site, lora)
        per_layer = (*site.lead[1:], *site.ins, rank) if site.axes[0] == "layers" else (*site.lead, *site.ins, rank)
        bound = 1 / math.sqrt(math.prod(site.ins))
        drawn = [
            np.random.default_rng([seed, zlib.crc32(name.encode())]).uniform(-bound, bound, per_layer)
            for name in site.names
        ]
        a = np.stack(drawn) if site.axes[0] == "layers" else drawn[0]
        leaves: Tree = {"a": a.astype(dtype), "b": np.zeros((*site.lead, rank, *site.outs), dtype)}
        if lora.dora and params is not None:
            kernel = np.asarray(_leaf(params, site.path)["kernel"], np.float64)
            summed = tuple(range(site.stacked, site.stacked + site.inputs))
            leaves["magnitude"] = np.sqrt(np.square(kernel).sum(summed)).astype(dtype)
        _put(tree, site.path, leaves)
    return tree


def scales(targets: Sequence[Site], lora: config.LoRA, dtype: Any) -> Tree:
    """The collection `adapter_scale`: one number for each linear map, or for each of its repeats."""
    tree: Tree = {}
    for site in targets:
        each = [lora.scale_of(name) for name in site.names]
        stacked = site.axes[0] == "layers"
        leaves = {"scale": np.array(each if stacked else each[0], dtype)}
        if lora.dropout:
            leaves["dropout"] = np.full((len(each),) if stacked else (), lora.dropout, dtype)
        _put(tree, site.path, leaves)
    return tree


def abstract(targets: Sequence[Site], lora: config.LoRA, dtype: Any) -> tuple[Tree, Tree]:
    """Shapes and logical axes of the adapters, without allocating anything."""
    shapes: Tree = {}
    axes: Tree = {}
    for site in targets:
        rank = _rank(site, lora)
        sizes = {"a": (*site.lead, *site.ins, rank), "b": (*site.lead, rank, *site.outs)}
        if lora.dora:
            sizes["magnitude"] = (*site.lead, *site.outs)
        _put(shapes, site.path, {name: jax.ShapeDtypeStruct(size, dtype) for name, size in sizes.items()})
        _put(axes, site.path, {name: site.axes_of(name) for name in sizes})
    return shapes, axes


def _rank(site: Site, lora: config.LoRA) -> int:
    ranks = {lora.rank_of(name) for name in site.names}
    if len(ranks) > 1:
        raise UserError(
            f"lora.rank_pattern gives {site.names[0]} and other layers of its stack different ranks",
            'model.layer_loop = "unroll" takes any ranks',
        )
    (rank,) = ranks
    most = min(math.prod(site.ins), math.prod(site.outs))
    if not 1 <= rank <= most:
        raise UserError(f"lora.rank = {rank}: {site.names[0]} has ranks from 1 to {most}")
    return rank


def merged(
    params: Tree, adapters: Tree, scale: Tree, targets: Sequence[Site], xp: Any = np, dtype: Any = np.float64
) -> Tree:
    """The base with its adapters added: computed in `dtype`, rounded once to that of the base.

    Args:
        xp: the array library, numpy or `jax.numpy`.
        dtype: to compute in; float64 for what is exported.
    """
    copy = jax.tree.map(lambda leaf: leaf, params)
    for site in targets:
        leaves, lead = _leaf(adapters, site.path), len(site.lead)
        kernel = xp.asarray(_leaf(params, site.path)["kernel"])
        a, b = (xp.asarray(leaves[name], dtype) for name in ("a", "b"))
        a = a.reshape(*site.lead, math.prod(site.ins), -1)
        b = b.reshape(*site.lead, a.shape[-1], math.prod(site.outs))
        factor = xp.asarray(_leaf(scale, site.path)["scale"], dtype)
        factor = factor.reshape(*factor.shape, *(1,) * (lead + 2 - factor.ndim))
        whole = kernel.astype(dtype) + (factor * (a @ b)).reshape(kernel.shape)
        if "magnitude" in leaves:
            summed = tuple(range(lead, lead + site.inputs))
            norm = xp.sqrt(xp.square(whole).sum(summed, keepdims=True))
            magnitude = xp.asarray(leaves["magnitude"], dtype)
            whole = whole * (xp.expand_dims(magnitude, summed) / norm)
        _leaf(copy, site.path)["kernel"] = whole.astype(kernel.dtype)
    return copy


def _canonical(path: tuple[str, ...], cfg: config.Model) -> tuple[str, ...]:
    """Canonical names of the modules at a path of the live tree."""
    if path[0] == "layers":
        slot, slots = int(path[1].removeprefix("slot_")), len(cfg.pattern)
        inside = ".".join(path[2:])
        return tuple(f"layers.{repeat * slots + slot}.{inside}" for repeat in range(cfg.repeats))
    first = path[0].replace("layers_", "layers.")
    return (".".join((first, *path[1:])),)


def _leaf(tree: Tree, path: tuple[str, ...]) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: Tree, path: tuple[str, ...], leaves: Mapping[str, Any]) -> None:
    for key in path:
        tree = tree.setdefault(key, {})
    tree.update(leaves)
