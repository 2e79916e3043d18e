"""The attention mixer: projections, optional QK-norm, rotation, cache.

Shapes: B batch, T length, D width, N heads, K kv heads, H head dim.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.cache import KVCache
from torch_ref.models.layers import Linear, Norm
from torch_ref.numerics import Policy
from torch_ref.ops.attention import Places, attention, cached_attention
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

    def forward(
        self,
        x_BTD: Float[Tensor, "b t d"],
        places: Places,
        rope: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
    ) -> tuple[Float[Tensor, "b t d"], KVCache | None]:
        cfg = self.config
        q_BTNH = self.q_proj(x_BTD)
        k_BTKH = self.k_proj(x_BTD)
        v_BTKH = self.v_proj(x_BTD)
        if cfg.qk_norm:
            q_BTNH = self.q_norm(q_BTNH)
            k_BTKH = self.k_norm(k_BTKH)
        if rope is not None:
            q_BTNH = apply_rope(q_BTNH, *rope, layout=cfg.rope_layout)
            k_BTKH = apply_rope(k_BTKH, *rope, layout=cfg.rope_layout)

        if cache is None:
            mixed = attention(q_BTNH, k_BTKH, v_BTKH, places, places, impl=cfg.attention_impl, aligned=True)
        else:
            cache = cache.append(k_BTKH, v_BTKH, places)
            mixed = cached_attention(q_BTNH, cache.keys, cache.values, places, cache.places)
        return self.o_proj(mixed), cache

    @staticmethod
    def empty_cache(
        cfg: config.Model, policy: Policy, batch: int, slots: int, device: torch.device | str = "cpu"
    ) -> KVCache:
        """A cache that has seen nothing."""
        return KVCache.empty(batch, slots, cfg.n_kv_heads, cfg.head_dim, policy.compute, device)

    def _project(self, heads: int) -> Linear:
        cfg = self.config
        return Linear(
            (cfg.d_model,), (heads, cfg.head_dim), std=cfg.init_std, policy=self.policy, use_bias="qkv" in cfg.biases
        )
