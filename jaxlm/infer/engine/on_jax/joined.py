"""Maps of one input as one product, for decoding: queries, keys and values; gate and up of a feed-forward.

A step reads every weight for a few tokens, and each product has a price of its own. The joined kernels take the place
of those that they are made of: they have the same bytes, and a module that finds them uses them. Parameters that are
trained, saved or converted stay apart.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.infer.generate import MAX_UNROLLED, unrolled_for_decoding
from jaxlm.mesh import Layout
from jaxlm.models.attention import QKV
from jaxlm.models.decoder import Decoder, Params, abstract_params
from jaxlm.models.ffn import GATE_UP
from jaxlm.processes import meet

_log = logging.getLogger(__name__)
TOLD_FROM = 64 << 20
"""Bytes of a second copy of weights that are worth a line."""


class _Join(NamedTuple):
    """The maps that become one, and along which axis their outputs follow each other."""

    whole: str
    parts: tuple[str, ...]
    axis: int


JOINS: Mapping[str, _Join] = {
    "mixer": _Join(QKV, ("q_proj", "k_proj", "v_proj"), -2),
    "ffn": _Join(GATE_UP, ("gate_proj", "up_proj"), -1),
}
"""By the half of a block that has the maps."""


def joined_for_decoding(decoder: Decoder, params: Params) -> tuple[Decoder, Params]:
    """`unrolled_for_decoding` with joined maps; what it has copied goes layer by layer, as their maps are joined."""
    made, own = unrolled_for_decoding(decoder, params)
    return made, joined(dict(params) if own is params else own)


def second_copy(decoder: Decoder, layout: Layout | None = None) -> int:
    """Bytes of weights that decoding holds on a device beside the model's own: all stacked layers, else joined maps.

    Args:
        layout: devices over which the model is split, if there are several; None: it lies on one.
    """
    model, (shapes, axes) = decoder.config, abstract_params(decoder)
    copied: list[tuple[Any, Any]] = []
    if model.scanned and model.n_layers <= MAX_UNROLLED:
        copied = [(shapes["layers"], axes["layers"])]
    elif not model.scanned and layout is None:
        places = [
            (name, half, part)
            for name, layer in shapes.items()
            for half, join in JOINS.items()
            if name.startswith("layers_") and _fits(layer, half)
            for part in join.parts
        ]
        copied = [(shapes[name][half][part], axes[name][half][part]) for name, half, part in places]
    return sum(_held(leaves, names, layout) for leaves, names in copied)


def _held(shapes: Any, axes: Any, layout: Layout | None) -> int:
    """Bytes that a device holds of a tree of shapes."""
    flat, tree = jax.tree.flatten(shapes)
    parts = [math.prod(map(layout.parts, names)) if layout else 1 for names in tree.flatten_up_to(axes)]
    return sum(leaf.size * leaf.dtype.itemsize // split for leaf, split in zip(flat, parts, strict=True))


def tell_second_copy(decoder: Decoder, layout: Layout | None) -> None:
    """One line about `second_copy`, where it is large, before it is made."""
    size = second_copy(decoder, layout)
    if size >= TOLD_FROM and meet.is_first():
        how = "its layers one by one" if decoder.config.scanned else "joined queries, keys and values, gate and up"
        _log.info("decoding takes %.2f GiB of weights a second time: %s", size / 2**30, how)


def joined(params: Params) -> Params:
    """The tree of an unrolled decoder with joined maps in all layers that have them, each in its own dtype.

    Maps that differ in dtype or lie on several devices stay apart, and so do those of stacked layers: such a model is
    too deep for a second copy of its weights.

    Args:
        params: emptied on the way, so that parts which nobody else holds are freed.
    """
    made = {}
    for name in list(params):
        layer = params.pop(name)
        made[name] = _with_joined_maps(layer) if name.startswith("layers_") else layer
    return made


def _fits(layer: Mapping[str, Any], half: str) -> bool:
    """True if a layer has all maps of a join, apart, on one device, in one dtype, each with a bias or each without."""
    maps = [layer.get(half, {}).get(part) for part in JOINS[half].parts]
    if not all(isinstance(one, Mapping) and "kernel" in one for one in maps):
        return False
    if any(isinstance(leaf, jax.Array) and len(leaf.devices()) > 1 for leaf in jax.tree.leaves(maps)):
        return False
    kinds = [{name: leaf.dtype for name, leaf in one.items()} for one in maps]
    return all(kind == kinds[0] for kind in kinds)


def _with_joined_maps(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The layer with joined maps in place of their parts, where it has them."""
    maps = {half: [layer[half][part] for part in JOINS[half].parts] for half in JOINS if _fits(layer, half)}
    made = {}
    for half, leaves in (_concatenated(maps) if maps else {}).items():
        rest = {name: leaf for name, leaf in layer[half].items() if name not in JOINS[half].parts}
        made[half] = rest | {JOINS[half].whole: leaves}
    return {**layer, **made}


@jax.jit
def _concatenated(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Of each half of a layer its maps as one: kernels [D, N, H] or [D, F], biases without the D."""
    return {
        half: jax.tree.map(lambda *leaves, axis=JOINS[half].axis: jnp.concatenate(leaves, axis), *parts)
        for half, parts in maps.items()
    }
