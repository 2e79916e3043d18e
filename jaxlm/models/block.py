"""A block: a token mixer and a channel mixer, each with its norm and residual. A repeat: the blocks of one pattern.

Shapes: B batch, T length, D width.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.config import parse_block
from jaxlm.mesh import constrain
from jaxlm.models.attention import Attention
from jaxlm.models.ffn import MLP
from jaxlm.models.layers import Norm
from jaxlm.numerics import Policy
from jaxlm.ops.attention import Places

MIXERS = {"attention": Attention}
FFNS = {"mlp": MLP}
REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Block(nn.Module):
    """Pre-norm `x + f(norm(x))` or post-norm `norm(x + f(x))`, for the mixer and then for the feed-forward."""

    kind: str
    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "b t d"], places: Places, rope: tuple[Array, Array] | None, cache: Any
    ) -> tuple[Float[Array, "b t d"], Any]:
        cfg = self.config
        mixer_name, ffn_name = parse_block(self.kind)
        mixer = MIXERS[mixer_name](cfg, self.policy, name="mixer")
        ffn = FFNS[ffn_name](cfg, self.policy, name="ffn")
        mixer_norm = Norm(cfg.norm, cfg.norm_eps, self.policy, name="mixer_norm")
        ffn_norm = Norm(cfg.norm, cfg.norm_eps, self.policy, name="ffn_norm")
        dropout = nn.Dropout(cfg.dropout, deterministic=not self.has_rng("dropout"))

        if cfg.norm_position == "pre":
            mixed, cache = mixer(mixer_norm(x_BTD), places, rope, cache)
            x_BTD = x_BTD + dropout(mixed)
            x_BTD = x_BTD + dropout(ffn(ffn_norm(x_BTD)))
        else:
            mixed, cache = mixer(x_BTD, places, rope, cache)
            x_BTD = mixer_norm(x_BTD + dropout(mixed))
            x_BTD = ffn_norm(x_BTD + dropout(ffn(x_BTD)))
        return constrain(x_BTD, "batch", "seq", "features"), cache


class Repeat(nn.Module):
    """One pass over the pattern: block `slot_s` for each of its entries."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "b t d"], places: Places, rope: tuple[Array, Array] | None, caches: Any
    ) -> tuple[Float[Array, "b t d"], Any]:
        block_class, after = rematerialised(self.config), []
        for slot, kind in enumerate(self.config.pattern):
            block = block_class(kind, self.config, self.policy, name=f"slot_{slot}")
            x_BTD, cache = block(x_BTD, places, rope, None if caches is None else caches[slot])
            after.append(cache)
        return x_BTD, None if caches is None else tuple(after)


def rematerialised(cfg: config.Model) -> type[Block]:
    """`Block`, wrapped by the recomputation policy of the config."""
    if cfg.remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=not cfg.scanned)
