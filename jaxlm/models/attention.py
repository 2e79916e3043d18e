"""The attention mixer: projections, optional QK-norm, rotation, window, sinks, cache.

Shapes: B batch, T length, D width, N heads, K kv heads, H head dim, M sink tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm import config
from jaxlm.mesh import constrain
from jaxlm.models.cache import KVCache, RowCache, WindowCache
from jaxlm.models.layers import Linear, Norm, logical
from jaxlm.models.sequence_parallel import attention_site
from jaxlm.numerics import Policy
from jaxlm.ops.attention.mix import Cached, First, How, Own, Rows, Seen, Sinks, mix
from jaxlm.ops.attention.visible import Places
from jaxlm.ops.rope import apply_rope, rope_table_of

Cache = KVCache | RowCache | WindowCache | None
Map = Callable[[Array], Array]

QKV = "qkv_proj"
"""The maps to queries, keys and values as one, where decoding has joined them: `infer.engine.on_jax.joined`."""


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
        cache: Cache,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        cfg = self.config
        query, key, value = self._maps()
        bare_BTNH, k_BTKH, v_BTKH = query(x_BTD), key(x_BTD), value(x_BTD)
        q_BTNH = constrain(self._rotated(bare_BTNH, rope), "batch", "seq", "heads", "head_dim")
        k_BTKH = self._rotated(k_BTKH, rope)

        # What the queries see: their own tokens or the cache, first tokens beyond the window, learned sinks.
        seen, cache = remembered(cache, k_BTKH, v_BTKH, places)
        if cfg.keep_first:
            seen.append(self._first(bare_BTNH, Own(k_BTKH, v_BTKH), places, cache))
        if cfg.sink_tokens:
            sinks_MD = self._sink_tokens(x_BTD.shape[-1])
            seen.append(Sinks(bare_BTNH, key(sinks_MD), value(sinks_MD)))
        impl = "auto" if self.is_initializing() else cfg.attention_impl  # nothing is computed then
        how = How(impl, cfg.window, cfg.softcap)
        mixed_BTNH = mix(q_BTNH, places, seen, how, self._sink_logits(), attention_site(cached=cache is not None))

        axes, biased = ("heads", "head_dim", "embed"), "attention_out" in cfg.biases
        std, out = cfg.residual_std, (cfg.d_model,)
        return Linear(out, axes, std, self.policy, n_in=2, use_bias=biased, name="o_proj")(mixed_BTNH), cache

    @staticmethod
    def empty_rows(cfg: config.Model, policy: Policy, rows: int, slots: int, room: int = 0) -> RowCache | WindowCache:
        """Rows for texts that begin and end on their own, of which `room` tokens may be taken back."""
        sizes = cfg.n_kv_heads, cfg.head_dim, policy.compute
        if cfg.window:
            return WindowCache.empty(rows, min(slots, cfg.window + room), cfg.keep_first, *sizes)
        return RowCache.empty(rows, slots, *sizes)

    @staticmethod
    def empty_cache(cfg: config.Model, policy: Policy, batch: int, slots: int) -> KVCache | WindowCache:
        """A cache that has seen nothing."""
        sizes = cfg.n_kv_heads, cfg.head_dim, policy.compute
        if cfg.window:
            return WindowCache.empty(batch, min(slots, cfg.window), cfg.keep_first, *sizes)
        return KVCache.empty(batch, slots, *sizes)

    def _maps(self) -> tuple[Map, Map, Map]:
        """From [.., D] to queries, keys and values of each head, queries and keys normalised if the config says so."""
        cfg = self.config
        query, key, value = self._joined() if self.has_variable("params", QKV) else self._apart()
        if not cfg.qk_norm:
            return query, key, value
        norm = functools.partial(Norm, "rmsnorm", cfg.norm_eps, self.policy, axis="head_dim")
        q_norm, k_norm = norm(name="q_norm"), norm(name="k_norm")
        return lambda x: q_norm(query(x)), lambda x: k_norm(key(x)), value

    def _apart(self) -> tuple[Map, Map, Map]:
        cfg = self.config
        query, key = self._project("q_proj", cfg.n_heads, "heads"), self._project("k_proj", cfg.n_kv_heads, "kv_heads")
        return query, key, self._project("v_proj", cfg.n_kv_heads, "kv_heads")

    def _joined(self) -> tuple[Map, Map, Map]:
        """Parts of one product; a compiler computes it once for the three."""
        n, k = self.config.n_heads, self.config.n_kv_heads
        whole, values = self._project(QKV, n + 2 * k, "heads"), n + k
        return lambda x: whole(x)[..., :n, :], lambda x: whole(x)[..., n:values, :], lambda x: whole(x)[..., values:, :]

    def _rotated(self, x_BTNH: Array, rope: tuple[Array, Array] | None) -> Array:
        return x_BTNH if rope is None else apply_rope(x_BTNH, *rope, layout=self.config.rope_layout)

    def _first(self, bare_BTNH: Array, own: Own, places: Places, cache: Cache) -> First:
        """The first tokens of each document, seen from the distance that a cache without gaps would have."""
        cfg, near = self.config, None
        if cfg.rope is not None:
            nearer_BT = jnp.minimum(places.positions, cfg.window + cfg.keep_first - 1)
            near = rope_table_of(nearer_BT, cfg.rope, bare_BTNH.dtype)
        kept = own
        if isinstance(cache, WindowCache):
            kept = Cached(cache.first.keys, cache.first.values, cache.first.places)
        return First(self._rotated(bare_BTNH, near), kept, cfg.keep_first)

    def _sink_tokens(self, width: int) -> Array:
        init = logical(nn.initializers.normal(self.config.init_std), None, "embed")
        return self.param("sink_tokens", init, (self.config.sink_tokens, width), self.policy.params)

    def _sink_logits(self) -> Array | None:
        cfg, init = self.config, logical(nn.initializers.normal(self.config.init_std), "heads")
        return self.param("sink_logits", init, (cfg.n_heads,), self.policy.params) if cfg.sink_logits else None

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


def remembered(cache: Cache, k_BTKH: Array, v_BTKH: Array, places: Places) -> tuple[list[Seen], Cache]:
    """The keys of the call's own tokens and of those before them, and the cache after them."""
    own = Own(k_BTKH, v_BTKH)
    if cache is None:
        return [own], None
    if isinstance(cache, RowCache):
        cache = cache.append(k_BTKH, v_BTKH, places)
        return [Rows(cache.keys, cache.values, cache.row)], cache
    slots, cache = cache.extend(k_BTKH, v_BTKH, places)
    kept = Cached(slots.keys, slots.values, slots.places)
    # Several tokens at once see the window as it was before them, and one another.
    return [kept, own] if isinstance(cache, WindowCache) and k_BTKH.shape[1] > 1 else [kept], cache
