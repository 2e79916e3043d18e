"""The attention mixer: projections, optional QK-norm, rotation, window, sinks, cache.

Shapes: B batch, T length, D width, N heads, K kv heads, H head dim, M sink tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.cache import KVCache, RowCache, WindowCache
from torch_ref.models.layers import Linear, Norm, Rotation, normal_
from torch_ref.numerics import Policy
from torch_ref.ops.attention.attend import Places
from torch_ref.ops.attention.mix import Cached, First, How, Own, Seen, Sinks, mix
from torch_ref.ops.rope import apply_rope

Cache = KVCache | RowCache | WindowCache | None


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); N kv heads give MHA, one gives MQA."""

    def __init__(self, config: config.Model, policy: Policy) -> None:
        super().__init__()
        self.config, self.policy = config, policy
        self.q_proj = self._project(config.n_heads)
        self.k_proj = self._project(config.n_kv_heads)
        self.v_proj = self._project(config.n_kv_heads)
        if config.qk_norm:
            self.q_norm = Norm("rmsnorm", config.norm_eps, policy, config.head_dim)
            self.k_norm = Norm("rmsnorm", config.norm_eps, policy, config.head_dim)
        self.o_proj = Linear(
            (config.n_heads, config.head_dim),
            (config.d_model,),
            std=config.residual_std,
            policy=policy,
            use_bias="attention_out" in config.biases,
        )

        rope = config.rope if config.keep_first else None
        self.rotation = Rotation(rope, policy) if rope else None
        if config.sink_tokens:
            self.sink_tokens = nn.Parameter(torch.empty(config.sink_tokens, config.d_model, dtype=policy.params))
        if config.sink_logits:
            self.sink_logits = nn.Parameter(torch.empty(config.n_heads, dtype=policy.params))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal sinks."""
        if self.config.sink_tokens:
            normal_(self.sink_tokens, self.config.init_std, generator)
        if self.config.sink_logits:
            normal_(self.sink_logits, self.config.init_std, generator)

    def forward(
        self,
        x_BTD: Float[Tensor, "b t d"],
        places: Places,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache,
    ) -> tuple[Float[Tensor, "b t d"], Cache]:
        cfg = self.config
        bare_BTNH, k_BTKH, v_BTKH = self._query(x_BTD), self._key(x_BTD), self.v_proj(x_BTD)
        q_BTNH, k_BTKH = self._rotated(bare_BTNH, rope), self._rotated(k_BTKH, rope)

        # What the queries see: their own tokens or the cache, first tokens beyond the window, learned sinks.
        seen, cache = remembered(cache, k_BTKH, v_BTKH, places)
        if cfg.keep_first:
            seen.append(self._first(bare_BTNH, Own(k_BTKH, v_BTKH), places, cache))
        if cfg.sink_tokens:
            seen.append(Sinks(bare_BTNH, self._key(self.sink_tokens), self.v_proj(self.sink_tokens)))
        how = How(cfg.attention_impl, cfg.window, cfg.softcap)
        mixed_BTNH = mix(q_BTNH, places, seen, how, self.sink_logits if cfg.sink_logits else None)
        return self.o_proj(mixed_BTNH), cache

    @staticmethod
    def empty_cache(
        cfg: config.Model, policy: Policy, batch: int, slots: int, device: torch.device | str = "cpu"
    ) -> KVCache | WindowCache:
        """A cache that has seen nothing."""
        sizes = cfg.n_kv_heads, cfg.head_dim, policy.compute, device
        if cfg.window:
            return WindowCache.empty(batch, min(slots, cfg.window), cfg.keep_first, *sizes)
        return KVCache.empty(batch, slots, *sizes)

    def _query(self, x_BTD: Tensor) -> Tensor:
        q_BTNH = self.q_proj(x_BTD)
        return self.q_norm(q_BTNH) if self.config.qk_norm else q_BTNH

    def _key(self, x_BTD: Tensor) -> Tensor:
        k_BTKH = self.k_proj(x_BTD)
        return self.k_norm(k_BTKH) if self.config.qk_norm else k_BTKH

    def _rotated(self, x_BTNH: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        return x_BTNH if rope is None else apply_rope(x_BTNH, *rope, layout=self.config.rope_layout)

    def _first(self, bare_BTNH: Tensor, own: Own, places: Places, cache: Cache) -> First:
        """The first tokens of each document, seen from the distance that a cache without gaps would have."""
        cfg, near = self.config, None
        if self.rotation is not None:
            near = self.rotation.table(places.positions.clamp(max=cfg.window + cfg.keep_first - 1))
        kept = own
        if isinstance(cache, WindowCache):
            kept = Cached(cache.first.keys, cache.first.values, cache.first.places)
        return First(self._rotated(bare_BTNH, near), kept, cfg.keep_first)

    def _project(self, heads: int) -> Linear:
        cfg = self.config
        return Linear(
            (cfg.d_model,), (heads, cfg.head_dim), std=cfg.init_std, policy=self.policy, use_bias="qkv" in cfg.biases
        )


def remembered(cache: Cache, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> tuple[list[Seen], Cache]:
    """The keys of the call's own tokens and of those before them, and the cache after them."""
    own = Own(k_BTKH, v_BTKH)
    if cache is None:
        return [own], None
    slots, cache = cache.extend(k_BTKH, v_BTKH, places)
    kept = Cached(slots.keys, slots.values, slots.places)
    # Several tokens at once see the window as it was before them, and one another.
    return [kept, own] if isinstance(cache, WindowCache) and k_BTKH.shape[1] > 1 else [kept], cache
