"""The trees of a run that trains adapters: what moves, what is frozen, how both begin, the whole model of both.

trained   the collection `adapters` of the decoder, and whole modules outside the layers (`lora.modules_to_save`)
frozen    `params` (without kernels that lie in four bits), `adapter_scale` and `nf4`
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config
from jaxlm.models import four_bits, lora
from jaxlm.models.adapted import NF4, SCALES, split
from jaxlm.models.decoder import Decoder, Params, abstract_params

Shapes = tuple[Params, Params]
"""Shapes and logical axes."""


def targets(decoder: Decoder, options: config.LoRA) -> list[lora.Site]:
    """The linear maps that have an adapter.

    Raises:
        UserError: see `lora.chosen`.
    """
    return lora.chosen(lora.sites(decoder), options)


def abstract_trained(decoder: Decoder, options: config.LoRA) -> Shapes:
    """Shapes and logical axes of the adapters, and of the modules that are trained whole.

    Raises:
        UserError: a pattern or a name matches nothing, a rank is above what the matrix has.
    """
    shapes, axes = lora.abstract(targets(decoder, options), options, decoder.policy.params)
    whole, named = abstract_params(decoder)
    saved = options.saved(name for name in whole if not name.startswith("layers"))
    return shapes | {name: whole[name] for name in saved}, axes | {name: named[name] for name in saved}


def adapter_params(decoder: Decoder, options: config.LoRA) -> int:
    """Parameters of all adapters in matrix products."""
    leaves = jax.tree_util.tree_leaves_with_path(split(abstract_trained(decoder, options)[0])[0])
    return sum(leaf.size for path, leaf in leaves if path[-1].key != "magnitude")


def saved_params(decoder: Decoder, options: config.LoRA) -> int:
    """Parameters in matrix products of the modules that are trained whole: of the output matrix, if it is one."""
    saved, cfg = split(abstract_trained(decoder, options)[0])[1], decoder.config
    outputs = {"head": "kernel", "score": "kernel"} | ({"embed": "embedding"} if cfg.tie_embeddings else {})
    return sum(saved[name][leaf].size for name, leaf in outputs.items() if name in saved)


def moved_params(decoder: Decoder, options: config.LoRA) -> tuple[int, int]:
    """Parameters in matrix products that move: of all adapters, and of the modules that are trained whole."""
    return adapter_params(decoder, options), saved_params(decoder, options)


def abstract_base(decoder: Decoder, options: config.LoRA) -> Shapes:
    """Shapes and logical axes of the collections that are frozen."""
    every = lora.sites(decoder)
    scales = lora.scales(lora.chosen(every, options), options, decoder.policy.params)
    shapes, axes = abstract_params(decoder)
    named: Params = {SCALES: jax.tree.map(lambda leaf: (None,) * leaf.ndim, scales)}
    found: Params = {SCALES: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), scales)}
    if options.quantize == "nf4":
        found[NF4], named[NF4] = four_bits.abstract(every, double=options.double_quantize)
        shapes, axes = (four_bits.without_packed(tree, every) for tree in (shapes, axes))
    return {"params": shapes, **found}, {"params": axes, **named}


def base_collections(decoder: Decoder, options: config.LoRA, base: Params) -> Params:
    """The collections that are frozen, for a base of numpy arrays."""
    every = lora.sites(decoder)
    found: Params = {SCALES: lora.scales(lora.chosen(every, options), options, decoder.policy.params)}
    if options.quantize == "nf4":
        base, found[NF4] = four_bits.split(base, every, double=options.double_quantize)
    return {"params": base, **found}


def new_adapters(decoder: Decoder, options: config.LoRA, base: Params, seed: int) -> Params:
    """The adapters that a run begins with, in numpy arrays: see `lora.init`. Whole modules begin as the base's."""
    outside = options.saved(name for name in base if not name.startswith("layers"))
    saved = {name: jax.tree.map(np.array, base[name]) for name in outside}
    if options.dora and options.quantize == "nf4":  # the magnitudes are those of the values in use
        every, dtype = lora.sites(decoder), decoder.policy.params
        base = four_bits.joined(*four_bits.split(base, every, double=options.double_quantize), every, dtype)
    return lora.init(targets(decoder, options), options, seed, decoder.policy.params, base) | saved


def whole(decoder: Decoder, options: config.LoRA, adapters: Params, frozen: Params) -> Params:
    """The base with its adapters added, in numpy arrays; of a base in four bits, the dequantised values count."""
    adapters, frozen = (jax.tree.map(np.asarray, tree) for tree in (adapters, frozen))
    low_rank, saved = split(adapters)
    return lora.merged(_joined(decoder, frozen), low_rank, frozen[SCALES], targets(decoder, options)) | saved


def whole_on_devices(decoder: Decoder, options: config.LoRA, adapters: Params, frozen: Params) -> Params:
    """As `whole`, but traced, in the dtype of the parameters: for samples while a run trains."""
    base, (low_rank, saved) = _joined(decoder, frozen), split(adapters)
    sites, dtype = targets(decoder, options), decoder.policy.params
    return lora.merged(base, low_rank, frozen[SCALES], sites, jnp, dtype) | saved


def _joined(decoder: Decoder, frozen: Params) -> Params:
    if NF4 not in frozen:
        return frozen["params"]
    return four_bits.joined(frozen["params"], frozen[NF4], lora.sites(decoder), decoder.policy.params)
