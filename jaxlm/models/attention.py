"""The attention mixer: projections, optional QK-norm, rotation, cache.

Shapes: B batch, T length, D width, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import flax.linen as nn
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.mesh import constrain
from jaxlm.models.cache import KVCache
from jaxlm.models.layers import Linear, Norm
from jaxlm.numerics import Policy
from jaxlm.ops.attention import Places, attention, cached_attention
from jaxlm.ops.rope import apply_rope


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); N kv heads give MHA, one gives MQA."""

    config: config.Model
    policy: Policy

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        places: Places,
        rope: tuple[Array, Array] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        cfg = self.config
        q_BTNH = self._project("q_proj", cfg.n_heads, "heads")(x_BTD)
        k_BTKH = self._project("k_proj", cfg.n_kv_heads, "kv_heads")(x_BTD)
        v_BTKH = self._project("v_proj", cfg.n_kv_heads, "kv_heads")(x_BTD)
        if cfg.qk_norm:
            q_BTNH = Norm("rmsnorm", cfg.norm_eps, self.policy, axis="head_dim", name="q_norm")(q_BTNH)
            k_BTKH = Norm("rmsnorm", cfg.norm_eps, self.policy, axis="head_dim", name="k_norm")(k_BTKH)
        if rope is not None:
            q_BTNH = apply_rope(q_BTNH, *rope, layout=cfg.rope_layout)
            k_BTKH = apply_rope(k_BTKH, *rope, layout=cfg.rope_layout)
        q_BTNH = constrain(q_BTNH, "batch", "seq", "heads", "head_dim")

        if cache is None:
            mixed = attention(q_BTNH, k_BTKH, v_BTKH, places, places, impl=cfg.attention_impl, aligned=True)
        else:
            cache = cache.append(k_BTKH, v_BTKH, places)
            mixed = cached_attention(q_BTNH, cache.keys, cache.values, places, cache.places)

        o_proj = Linear(
            (cfg.d_model,),
            ("heads", "head_dim", "embed"),
            std=cfg.residual_std,
            policy=self.policy,
            n_in=2,
            use_bias="attention_out" in cfg.biases,
            name="o_proj",
        )
        return o_proj(mixed), cache

    @staticmethod
    def empty_cache(cfg: config.Model, policy: Policy, batch: int, slots: int) -> KVCache:
        """A cache that has seen nothing."""
        return KVCache.empty(batch, slots, cfg.n_kv_heads, cfg.head_dim, policy.compute)

    def _project(self, name: str, heads: int, axis: str) -> Linear:
        cfg = self.config
        return Linear(
            (heads, cfg.head_dim),
            ("embed", axis, "head_dim"),
            std=cfg.init_std,
            policy=self.policy,
            use_bias="qkv" in cfg.biases,
            name=name,
        )
