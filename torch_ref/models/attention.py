"""The attention mixer: projections, optional QK-norm, rotation, window, sinks, cache.

Shapes: B batch, T length, D width, N heads, K kv heads, H head dim, M sink tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.cache import KVCache, RowCache, Slots, WindowCache
from torch_ref.models.layers import Linear, Norm, Rotation, normal_
from torch_ref.numerics import Policy
from torch_ref.ops.attention import attend as ops
from torch_ref.ops.attention.attend import Mixed, Places
from torch_ref.ops.rope import apply_rope


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
        cache: KVCache | RowCache | WindowCache | None,
    ) -> tuple[Float[Tensor, "b t d"], KVCache | RowCache | WindowCache | None]:
        cfg = self.config
        q_BTNH, k_BTKH, v_BTKH = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if cfg.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        bare_BTNH = q_BTNH
        if rope is not None:
            q_BTNH = apply_rope(q_BTNH, *rope, layout=cfg.rope_layout)
            k_BTKH = apply_rope(k_BTKH, *rope, layout=cfg.rope_layout)

        options: Any = {"window": cfg.window, "softcap": cfg.softcap}
        aligned: Any = options | {"impl": cfg.attention_impl, "aligned": True}
        new, several = (k_BTKH, v_BTKH, places, places), False
        if cache is None:
            mix, part, held, options = ops.attention, ops.attend, new, aligned
        else:
            slots, cache = cache.extend(k_BTKH, v_BTKH, places)
            several = isinstance(cache, WindowCache) and x_BTD.shape[1] > 1
            mix, part, held = ops.cached_attention, ops.cached_attend, (slots.keys, slots.values, places, slots.places)
        if not (several or cfg.keep_first or cfg.sink_tokens or cfg.sink_logits):
            return self.o_proj(mix(q_BTNH, *held, **options)), cache
        parts = [part(q_BTNH, *held, **options)]
        if several:
            parts.append(ops.attend(q_BTNH, *new, **aligned))
        if cfg.keep_first:
            first = cache.first if isinstance(cache, WindowCache) else None
            parts.append(self._retained(bare_BTNH, k_BTKH, v_BTKH, places, first))
        if cfg.sink_tokens:
            k_MKH, v_MKH = self.k_proj(self.sink_tokens), self.v_proj(self.sink_tokens)
            k_MKH = self.k_norm(k_MKH) if cfg.qk_norm else k_MKH
            parts.append(ops.attend_sinks(bare_BTNH, k_MKH, v_MKH, places.segments, softcap=cfg.softcap))
        mixed = ops.merge(parts, self.sink_logits if cfg.sink_logits else None, v_BTKH.dtype)
        return self.o_proj(mixed), cache

    @staticmethod
    def empty_cache(
        cfg: config.Model, policy: Policy, batch: int, slots: int, device: torch.device | str = "cpu"
    ) -> KVCache | WindowCache:
        """A cache that has seen nothing."""
        sizes = cfg.n_kv_heads, cfg.head_dim, policy.compute, device
        if cfg.window:
            return WindowCache.empty(batch, min(slots, cfg.window), cfg.keep_first, *sizes)
        return KVCache.empty(batch, slots, *sizes)

    def _retained(
        self, bare_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, places: Places, first: Slots | None
    ) -> Mixed:
        """What queries take from the first tokens beyond the window, at the distance of a cache without gaps."""
        cfg, q_BTNH = self.config, bare_BTNH
        if self.rotation is not None:
            near = self.rotation.table(places.positions.clamp(max=cfg.window + cfg.keep_first - 1))
            q_BTNH = apply_rope(q_BTNH, *near, layout=cfg.rope_layout)
        if first is not None:
            options: Any = {"beyond": cfg.window, "softcap": cfg.softcap}
            return ops.cached_attend(q_BTNH, first.keys, first.values, places, first.places, **options)
        options = {"keep_first": cfg.keep_first, "window": cfg.window, "softcap": cfg.softcap}
        return ops.attend_first(q_BTNH, k_BTKH, v_BTKH, places, **options)

    def _project(self, heads: int) -> Linear:
        cfg = self.config
        return Linear(
            (cfg.d_model,), (heads, cfg.head_dim), std=cfg.init_std, policy=self.policy, use_bias="qkv" in cfg.biases
        )
