"""The attention mixer: projections, optional QK-norm, rotation, window, sinks, cache.

Shapes: B batch, T length, D width, N heads, K kv heads, H head dim, M sink tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.mesh import constrain
from jaxlm.models.cache import KVCache, RowCache, Slots, WindowCache
from jaxlm.models.layers import Linear, Norm, logical
from jaxlm.models.sequence_parallel import ROW, over_sequence, repeated, sequence_axis
from jaxlm.numerics import Policy
from jaxlm.ops.attention import attend as ops
from jaxlm.ops.attention import ring, slots, visible
from jaxlm.ops.attention.visible import Mixed, Places
from jaxlm.ops.rope import apply_rope, rope_table_of

HEADS = (*ROW, "heads", "head_dim")
SELF = (HEADS, HEADS, HEADS, ROW)
MIXED = Mixed(HEADS, HEADS[:3])  # pyright: ignore[reportArgumentType]


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
        cache: KVCache | RowCache | WindowCache | None,
    ) -> tuple[Float[Array, "b t d"], KVCache | RowCache | WindowCache | None]:
        cfg = self.config
        q_proj = self._project("q_proj", cfg.n_heads, "heads")
        k_proj = self._project("k_proj", cfg.n_kv_heads, "kv_heads")
        v_proj = self._project("v_proj", cfg.n_kv_heads, "kv_heads")
        q_BTNH, k_BTKH, v_BTKH = q_proj(x_BTD), k_proj(x_BTD), v_proj(x_BTD)
        k_norm = None
        if cfg.qk_norm:
            q_BTNH = Norm("rmsnorm", cfg.norm_eps, self.policy, axis="head_dim", name="q_norm")(q_BTNH)
            k_norm = Norm("rmsnorm", cfg.norm_eps, self.policy, axis="head_dim", name="k_norm")
            k_BTKH = k_norm(k_BTKH)
        bare_BTNH = q_BTNH
        if rope is not None:
            q_BTNH = apply_rope(q_BTNH, *rope, layout=cfg.rope_layout)
            k_BTKH = apply_rope(k_BTKH, *rope, layout=cfg.rope_layout)
        q_BTNH = constrain(q_BTNH, "batch", "seq", "heads", "head_dim")

        options: Any = {"window": cfg.window, "softcap": cfg.softcap}
        aligned: Any = options | {"impl": cfg.attention_impl, "aligned": True}
        new: Any = (k_BTKH, v_BTKH, places, places)
        held: Any = new
        several = False
        merged = bool(cfg.keep_first or cfg.sink_tokens)
        needs = {"softcap": bool(cfg.softcap), "sinks": cfg.sink_logits, "merged": merged}
        splash = cache is None and ops.choose(cfg.attention_impl, q_BTNH, aligned=True, **needs) == "splash"
        if cache is None and sequence_axis():
            held, options = (*_spread(k_BTKH, v_BTKH), places), {}
            local = {"window": cfg.window, "softcap": cfg.softcap, "impl": cfg.attention_impl}
            mix = over_sequence(functools.partial(ring.attention, **local), SELF, HEADS)
            part = over_sequence(functools.partial(ring.attend, **local), SELF, MIXED)
        elif cache is None:
            mix, part, options = ops.attention, ops.attend, aligned
        elif isinstance(cache, RowCache):
            cache = cache.append(k_BTKH, v_BTKH, places)
            mix, part, held = slots.mix_slots, slots.attend_slots, (cache.keys, cache.values, places, cache.row)
            options = {"softcap": cfg.softcap}
        else:
            kept, cache = cache.extend(k_BTKH, v_BTKH, places)
            several = isinstance(cache, WindowCache) and x_BTD.shape[1] > 1
            mix, part, held = ops.cached_attention, ops.cached_attend, (kept.keys, kept.values, places, kept.places)
        if splash:
            from jaxlm.ops.attention import splash as kernel  # loads Pallas, which only TPUs need

            options = {"window": cfg.window, "softcap": cfg.softcap, "sink_logits_N": self._sink_logits()}
            mixed = kernel.splash(q_BTNH, k_BTKH, v_BTKH, places.segments, **options)
        elif not (several or merged or cfg.sink_logits):
            mixed = mix(q_BTNH, *held, **options)
        else:
            parts = [part(q_BTNH, *held, **options)]
            if several:
                parts.append(ops.attend(q_BTNH, *new, **aligned))
            if cfg.keep_first:
                first = cache.first if isinstance(cache, WindowCache) else None
                parts.append(self._retained(bare_BTNH, k_BTKH, v_BTKH, places, first))
            if cfg.sink_tokens:
                init = logical(nn.initializers.normal(cfg.init_std), None, "embed")
                sinks_MD = self.param("sink_tokens", init, (cfg.sink_tokens, x_BTD.shape[-1]), self.policy.params)
                k_MKH, v_MKH = k_proj(sinks_MD), v_proj(sinks_MD)
                k_MKH = k_MKH if k_norm is None else k_norm(k_MKH)
                parts.append(ops.attend_sinks(bare_BTNH, k_MKH, v_MKH, places.segments, softcap=cfg.softcap))
            mixed = visible.merge(parts, self._sink_logits(), v_BTKH.dtype)

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
    def empty_rows(cfg: config.Model, policy: Policy, rows: int, slots: int) -> RowCache | WindowCache:
        """Rows for texts that begin and end on their own; see `empty_cache`."""
        if cfg.window:
            return Attention.empty_cache(cfg, policy, rows, slots)  # pyright: ignore[reportReturnType]
        return RowCache.empty(rows, slots, cfg.n_kv_heads, cfg.head_dim, policy.compute)

    @staticmethod
    def empty_cache(cfg: config.Model, policy: Policy, batch: int, slots: int) -> KVCache | WindowCache:
        """A cache that has seen nothing."""
        sizes = cfg.n_kv_heads, cfg.head_dim, policy.compute
        if cfg.window:
            return WindowCache.empty(batch, min(slots, cfg.window), cfg.keep_first, *sizes)
        return KVCache.empty(batch, slots, *sizes)

    def _sink_logits(self) -> Array | None:
        cfg, init = self.config, logical(nn.initializers.normal(self.config.init_std), "heads")
        return self.param("sink_logits", init, (cfg.n_heads,), self.policy.params) if cfg.sink_logits else None

    def _retained(self, bare_BTNH: Array, k_BTKH: Array, v_BTKH: Array, places: Places, first: Slots | None) -> Mixed:
        """What queries take from the first tokens beyond the window, at the distance of a cache without gaps."""
        cfg, q_BTNH = self.config, bare_BTNH
        if cfg.rope is not None:
            near = rope_table_of(jnp.minimum(places.positions, cfg.window + cfg.keep_first - 1), cfg.rope, q_BTNH.dtype)
            q_BTNH = apply_rope(q_BTNH, *near, layout=cfg.rope_layout)
        if first is not None:
            options: Any = {"beyond": cfg.window, "softcap": cfg.softcap}
            return ops.cached_attend(q_BTNH, first.keys, first.values, places, first.places, **options)
        options = {"keep_first": cfg.keep_first, "window": cfg.window, "softcap": cfg.softcap}
        if sequence_axis():
            kept = over_sequence(functools.partial(ring.attend_first, **options), SELF, MIXED)
            return kept(q_BTNH, *_spread(k_BTKH, v_BTKH), places)
        return ops.attend_first(q_BTNH, k_BTKH, v_BTKH, places, **options)

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


def _spread(*kv_BTKH: Array) -> tuple[Array, ...]:
    """Keys and values with a kv head for every device that has query heads of it."""
    return tuple(repeated(x, 2, "heads") for x in kv_BTKH)
