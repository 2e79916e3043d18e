"""Frozen linear maps in four bits as trees: QLoRA's base (Dettmers et al. 2023). `models/adapted.py` computes with it.

A kernel [in..., out...] lies in the collection `nf4` under the path of its module: `codes` [out..., I / 2] and `scales`
[out..., I / 64], blocks along the flattened input as bitsandbytes has them in a weight [out, in]; with double
quantisation `scales` has eight bits each and `block_scales`, `offset` stand beside it. The values are made inside the
layer, so that there is never a second whole copy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlm.errors import UserError
from jaxlm.models.adapted import unpacked
from jaxlm.models.lora import Site, Tree
from jaxlm.ops import quantized


def packed(kernel: Float[Any, "..."], inputs: int, *, double: bool) -> Tree:
    """A kernel [in..., out...] in four bits a value."""
    size = math.prod(kernel.shape[:inputs])
    weight = jnp.moveaxis(jnp.asarray(kernel, jnp.float32).reshape(size, *kernel.shape[inputs:]), 0, -1)
    stored = quantized.quantize(weight)
    if not double:
        return {"codes": stored.codes, "scales": stored.scales}
    scales = quantized.quantize_scales(stored.scales)
    return {"codes": stored.codes, "scales": scales.codes, "block_scales": scales.scales, "offset": scales.offset}


def quantizable(site: Site) -> bool:
    """Whether the inputs of a linear map fill blocks; experts stay as they are."""
    return math.prod(site.ins) % quantized.BLOCK == 0 and "experts" not in site.axes


def split(params: Tree, all_sites: Sequence[Site], *, double: bool) -> tuple[Tree, Tree]:
    """The parameters without the kernels of all linear maps, and these in four bits.

    Raises:
        UserError: no linear map has inputs in blocks of 64.
    """
    chosen = [site for site in all_sites if quantizable(site)]
    if not chosen:
        raise UserError(f"lora.quantize: no linear map has a multiple of {quantized.BLOCK} inputs")
    packs: Tree = {}
    for site in chosen:
        holder, pack = params, packs
        for key in site.path:
            holder, pack = holder[key], pack.setdefault(key, {})
        pack.update(_stacked(holder["kernel"], site, double))
    return without_packed(params, all_sites), packs


def without_packed(params: Tree, all_sites: Sequence[Site]) -> Tree:
    """The parameters, or their shapes, without the kernels that lie in four bits."""
    rest = jax.tree.map(lambda leaf: leaf, params)
    for site in filter(quantizable, all_sites):
        holder = rest
        for key in site.path:
            holder = holder[key]
        del holder["kernel"]
    return _without_empty(rest)


def joined(rest: Tree, packs: Tree, all_sites: Sequence[Site], dtype: Any) -> Tree:
    """The whole parameters again: the values that the four bits stand for."""
    whole = jax.tree.map(lambda leaf: leaf, rest)
    for site in all_sites:
        pack: Any = packs
        for key in site.path:
            pack = pack.get(key, {}) if isinstance(pack, Mapping) else {}
        if not pack:
            continue
        pack, holder = jax.tree.map(jnp.asarray, pack), whole
        for key in site.path:
            holder = holder.setdefault(key, {})
        if site.axes[0] == "layers":
            layers = [jax.tree.map(lambda leaf, i=i: leaf[i], pack) for i in range(site.shape[0])]
            kernel = jnp.stack([unpacked(one, site.shape[1:], site.inputs) for one in layers])
        else:
            kernel = unpacked(pack, site.shape, site.inputs)
        holder["kernel"] = kernel.astype(dtype)
    return whole


def abstract(all_sites: Sequence[Site], *, double: bool) -> tuple[Tree, Tree]:
    """Shapes and logical axes of the kernels in four bits."""
    shapes: Tree = {}
    axes: Tree = {}
    for site in (site for site in all_sites if quantizable(site)):
        lead = ("layers",) if site.axes[0] == "layers" else ()
        hollow = jax.ShapeDtypeStruct(site.shape[len(lead) :], jnp.float32)
        one = jax.eval_shape(functools.partial(packed, inputs=site.inputs, double=False), hollow)
        sizes = {name: (*site.shape[: len(lead)], *leaf.shape) for name, leaf in one.items()}
        kinds = {"codes": jnp.uint8, "scales": jnp.uint8 if double else jnp.float32}
        outs = site.axes[len(lead) + site.inputs :]
        inner = site.axes[len(lead)] if site.inputs == 1 else None
        named = {"codes": (*lead, *outs, inner), "scales": (*lead, *outs, None)}
        if double:
            count = math.prod(one["scales"].shape)
            sizes |= {"block_scales": (*site.shape[: len(lead)], -(-count // quantized.SCALE_BLOCK))}
            sizes |= {"offset": site.shape[: len(lead)]}
            kinds |= {"block_scales": jnp.float32, "offset": jnp.float32}
            named |= {"block_scales": (*lead, None), "offset": lead}
        holder, names = shapes, axes
        for key in site.path:
            holder, names = holder.setdefault(key, {}), names.setdefault(key, {})
        holder.update({name: jax.ShapeDtypeStruct(sizes[name], kinds[name]) for name in sizes})
        names.update(named)
    return shapes, axes


def _stacked(kernel: Float[Any, "..."], site: Site, double: bool) -> Tree:
    if site.axes[0] != "layers":
        return jax.tree.map(np.asarray, packed(kernel, site.inputs, double=double))
    layers = [packed(one, site.inputs, double=double) for one in np.asarray(kernel)]
    return {name: np.stack([np.asarray(one[name]) for one in layers]) for name in layers[0]}


def _without_empty(tree: Tree) -> Tree:
    """A tree without modules that have no parameter left."""
    kept = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in kept.items() if not isinstance(value, dict) or value}
