"""Maps of one input as one product, for decoding: queries, keys and values; gate and up of a feed-forward.

A step reads every weight for a few tokens, and each product has a price of its own. The joined kernels take the place
of those that they are made of: they have the same bytes, and a module that finds them uses them. Parameters that are
trained, saved or converted stay apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.infer.generate import unrolled_for_decoding
from jaxlm.models.attention import QKV
from jaxlm.models.decoder import Decoder, Params
from jaxlm.models.ffn import GATE_UP


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
