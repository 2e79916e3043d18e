"""A block: a token mixer and a channel mixer, each with its norm and residual. A repeat: the blocks of one pattern.

Shapes: B batch, T length, D width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.mesh import constrain
from jaxlm.models.attention import Attention
from jaxlm.models.ffn import MLP
from jaxlm.models.layers import Norm
from jaxlm.models.mamba import Mamba, Mamba2
from jaxlm.models.moe import MoE
from jaxlm.numerics import Policy
from jaxlm.ops.attention.visible import Places

Tables = tuple[tuple[Array, Array], ...]
"""Sine and cosine of every rotation of the model, in the order of `config.Model.ropes`."""

Carry = tuple[Float[Array, "b t d"], dict[int, Float[Array, "b t d"]]]
"""The residual stream, and the outputs of layers that are kept, by their numbers."""

MIXERS = {"attention": Attention, "mamba": Mamba, "mamba2": Mamba2}
FFNS = {"mlp": MLP, "moe": MoE}
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nn.Module):
    """Pre-norm `x + f(norm(x))` or post-norm `norm(x + f(x))`, for the mixer and then for the feed-forward."""

    kind: str
    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "b t d"], places: Places, ropes: Tables, cache: Any
    ) -> tuple[Float[Array, "b t d"], Any]:
        cfg, halves = self.config, self.config.halves(self.kind)
        rope = halves.mixer.rope
        table = ropes[cfg.ropes.index(rope)] if halves.mixer_name == "attention" and rope else None
        mixer = MIXERS[halves.mixer_name](halves.mixer, self.policy, name="mixer")
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))

        norm = Norm(cfg.norm, cfg.norm_eps, self.policy, name="mixer_norm")
        pre = cfg.norm_position == "pre"
        mixed, cache = mixer(norm(x_BTD) if pre else x_BTD, places, table, cache)
        x_BTD = x_BTD + dropout(mixed) if pre else norm(x_BTD + dropout(mixed))
        if halves.ffn_name:
            ffn = FFNS[halves.ffn_name](halves.ffn, self.policy, name="ffn")
            norm = Norm(cfg.norm, cfg.norm_eps, self.policy, name="ffn_norm")
            x_BTD = x_BTD + dropout(ffn(norm(x_BTD), places)) if pre else norm(x_BTD + dropout(ffn(x_BTD, places)))
        return constrain(x_BTD, "batch", "seq", "features"), cache


class Repeat(nn.Module):
    """One pass over the pattern: block `slot_s` for each of its entries."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self, carry: Carry, places: Places, ropes: Tables, caches: Any, repeat: Int[Array, ""] | None
    ) -> tuple[Carry, Any]:
        """Returns what the next repeat takes, and the caches after this one; `repeat` counts where outputs are kept."""
        (x_BTD, kept), slots = carry, len(self.config.pattern)
        block_class, after = rematerialised(self.config), []
        for slot, kind in enumerate(self.config.pattern):
            block = block_class(kind, self.config, self.policy, name=f"slot_{slot}")
            x_BTD, cache = block(x_BTD, places, ropes, None if caches is None else caches[slot])
            after.append(cache)
            # One body serves all repeats, so that a layer is known by its number: an output is stored where it is due.
            due = {layer: repeat == layer // slots for layer in kept if layer % slots == slot}
            kept = kept | {layer: jnp.where(here, x_BTD, kept[layer]) for layer, here in due.items()}
        return (x_BTD, kept), None if caches is None else tuple(after)


def empty_cache(kind: str, cfg: config.Model, policy: Policy, batch: int, slots: int) -> Any:
    """What a block remembers before the first token of `batch` rows of up to `slots` tokens."""
    halves = cfg.halves(kind)
    return MIXERS[halves.mixer_name].empty_cache(halves.mixer, policy, batch, slots)


def rematerialised(cfg: config.Model) -> type[Block]:
    """`Block`, wrapped by the recomputation policy of the config."""
    if cfg.remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=not cfg.scanned)
