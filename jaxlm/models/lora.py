"""Adapters: low-rank updates of frozen linear maps, as functions of trees and one call in `Linear`.

    y = x W + s (x A) B        LoRA (Hu et al. 2021, eq. 3), s = alpha / r; rsLoRA: s = alpha / sqrt(r) (Kalajdzievski 2023)
    y = m / |W + s A B| * (x W + s (x A) B)      DoRA (Liu et al. 2024, eq. 5), the norm of each output detached (4.3)

An adapter lives in the collection `adapters` under the path of the kernel that it adapts: `a` [in..., r], `b` [r, out...]
and, for DoRA, `magnitude` [out...]. Its scale lies beside it in the collection `adapter_scale`, which is not trained.
B is zero at first, so that the first forward pass is the base's bit for bit.

Shapes: r rank, R repeats of a scanned pattern, E experts.
"""

from __future__ import annotations

import fnmatch
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.errors import UserError, did_you_mean
from jaxlm.mesh import Axes
from jaxlm.numerics import wide

ADAPTERS, SCALES, NF4 = "adapters", "adapter_scale", "nf4"
"""Collections: what is trained, what scales it, and frozen kernels in four bits."""

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
        return {"a": (*lead, *ins, None), "b": (*lead, None, *outs), "magnitude": (*lead, *outs), "scale": repeats}[name]


def adapted(
    module: nn.Module, x: Array, y: Array, kernel: Array, *, inputs: int, compute: Any
) -> Float[Array, "..."]:
    """What a linear map gives with its adapter, if it has one.

    Args:
        x: its input, the last `inputs` axes of which the kernel takes.
        y: what the frozen kernel makes of it, without a bias.
        kernel: in the compute dtype.
    """
    if not module.has_variable(ADAPTERS, "a"):
        return y
    a, b = (module.get_variable(ADAPTERS, name).astype(compute) for name in ("a", "b"))
    scale = module.get_variable(SCALES, "scale").astype(compute)
    if module.has_variable(SCALES, "dropout") and module.has_rng("dropout"):
        rate = module.get_variable(SCALES, "dropout")
        kept = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
        x = jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)
    y = y + scale * jnp.tensordot(jnp.tensordot(x.astype(compute), a, axes=inputs), b, axes=1)
    if not module.has_variable(ADAPTERS, "magnitude"):
        return y
    magnitude = module.get_variable(ADAPTERS, "magnitude")
    norm = column_norm(kernel, a, b, scale, inputs)
    return (magnitude.astype(norm.dtype) / jax.lax.stop_gradient(norm)).astype(compute) * y


def adapted_kernel(module: nn.Module, kernel: Float[Array, "e i o"], *, compute: Any) -> Float[Array, "e i o"]:
    """The kernels of all experts with their adapters: which tokens an expert gets is known only inside the op."""
    if not module.has_variable(ADAPTERS, "a"):
        return kernel
    a, b = (module.get_variable(ADAPTERS, name).astype(compute) for name in ("a", "b"))
    scale = module.get_variable(SCALES, "scale").astype(compute)
    whole = kernel + scale * jnp.einsum("eir,ero->eio", a, b)
    if not module.has_variable(ADAPTERS, "magnitude"):
        return whole
    width = wide(compute)
    norm_EO = jnp.sqrt(jnp.sum(jnp.square(whole.astype(width)), axis=1))
    magnitude_EO = module.get_variable(ADAPTERS, "magnitude").astype(width)
    return whole * (magnitude_EO / jax.lax.stop_gradient(norm_EO)).astype(compute)[:, None]


def column_norm(kernel: Array, a: Array, b: Array, scale: Array, inputs: int) -> Array:
    """Norm over the inputs of each output of `W + s A B`, in float32 or wider."""
    width = wide(kernel.dtype)
    whole = kernel.astype(width) + scale.astype(width) * jnp.tensordot(a.astype(width), b.astype(width), axes=1)
    return jnp.sqrt(jnp.sum(jnp.square(whole), axis=tuple(range(inputs))))


def sites(decoder: Any, shapes: Tree, axes: Tree) -> list[Site]:
    """Every linear map of a model, in the order of its live tree. `shapes`, `axes`: of `abstract_params(decoder)`."""
    cfg, found = decoder.config, {}
    for path, inputs in decoder.linear_maps().items():
        shape = _leaf(shapes, path)["kernel"].shape
        named = _leaf(axes, path)["kernel"]
        stacked = sum(axis in ("layers", "experts") for axis in named)
        found[path] = Site(path, _canonical(path, cfg), shape, named, stacked, inputs)
    return [found[path] for path in sorted(found)]


def chosen(all_sites: Sequence[Site], lora: config.LoRA) -> list[Site]:
    """The linear maps that `lora.targets` names.

    Raises:
        UserError: a pattern matches nothing, or only some of the layers of a stack.
    """
    for pattern in lora.targets:
        _require_match(pattern, all_sites, "lora.targets")
    found = []
    for site in all_sites:
        hits = [any(matches(pattern, name) for pattern in lora.targets) for name in site.names]
        if any(hits) and not all(hits):
            where = site.names[hits.index(False)]
            raise UserError(f"lora.targets leave out {where} of a stack", 'model.layer_loop = "unroll" takes any layers')
        if any(hits):
            found.append(site)
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a linear map: by its whole path, its path within a block, or its last name.

    `mixer.*`, `ffn.down`, `q_proj` and `layers.3.*` are patterns; `_proj` at the end may be left out.
    """
    inside = name.split(".", 2)[2] if name.startswith("layers.") else name
    names = (name, inside, name.rsplit(".", 1)[-1])
    spelled = (*names, *(one.removesuffix("_proj") for one in names))
    return any(fnmatch.fnmatchcase(one, pattern) for one in spelled)


def _require_match(pattern: str, all_sites: Sequence[Site], key: str) -> None:
    names = [name for site in all_sites for name in site.names]
    if not any(matches(pattern, name) for name in names):
        short = sorted({name.split(".", 2)[2] if name.startswith("layers.") else name for name in names})
        raise UserError(f"{key}: {pattern!r} matches no linear map", did_you_mean(pattern, short))


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
        rank = _rank(site, lora)
        each = [alpha_of(name, lora) / (math.sqrt(rank) if lora.rslora else rank) for name in site.names]
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


def rank_of(name: str, lora: config.LoRA) -> int:
    """The rank of the adapter of a linear map, by its canonical name."""
    return next((rank for pattern, rank in lora.rank_pattern.items() if matches(pattern, name)), lora.rank)


def alpha_of(name: str, lora: config.LoRA) -> float:
    """The same for alpha."""
    return next((alpha for pattern, alpha in lora.alpha_pattern.items() if matches(pattern, name)), lora.alpha)


def _rank(site: Site, lora: config.LoRA) -> int:
    ranks = {rank_of(name, lora) for name in site.names}
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


def merged(params: Tree, adapters: Tree, scale: Tree, targets: Sequence[Site]) -> Tree:
    """The base with its adapters added: computed in float64, rounded once to the dtype of the base."""
    copy = jax.tree.map(lambda leaf: leaf, params)
    for site in targets:
        leaves, lead = _leaf(adapters, site.path), len(site.lead)
        kernel = np.asarray(_leaf(params, site.path)["kernel"])
        a, b = (np.asarray(leaves[name], np.float64) for name in ("a", "b"))
        a = a.reshape(*site.lead, math.prod(site.ins), -1)
        b = b.reshape(*site.lead, a.shape[-1], math.prod(site.outs))
        factor = np.asarray(_leaf(scale, site.path)["scale"], np.float64)
        factor = factor.reshape(*factor.shape, *(1,) * (lead + 2 - factor.ndim))
        whole = kernel.astype(np.float64) + (factor * (a @ b)).reshape(kernel.shape)
        if "magnitude" in leaves:
            summed = tuple(range(lead, lead + site.inputs))
            norm = np.sqrt(np.square(whole).sum(summed, keepdims=True))
            magnitude = np.asarray(leaves["magnitude"], np.float64)
            whole = whole * (np.expand_dims(magnitude, summed) / norm)
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


