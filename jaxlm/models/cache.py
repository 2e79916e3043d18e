"""What a decoder remembers between calls: an explicit pytree, handed in and handed back.

Shapes: B batch, T new tokens, S slots, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention import Places


class KVCache(NamedTuple):
    """Ring buffer of keys and values; the token at position p lies in slot p mod S. A row holds one document."""

    k: Float[Array, "*r b s k h"]
    v: Float[Array, "*r b s k h"]
    positions: Int[Array, "*r b s"]
    """Position of the token in each slot, -1 when empty."""

    @classmethod
    def empty(cls, batch: int, slots: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
        """A cache that has seen nothing."""
        shape = (batch, slots, n_kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full((batch, slots), -1, jnp.int32))

    @property
    def places(self) -> Places:
        """Positions and segments of the slots: 1 when filled, 0 when empty."""
        return Places(self.positions, (self.positions >= 0).astype(jnp.int32))

    def append(self, k_BTKH: Array, v_BTKH: Array, places: Places) -> KVCache:
        """Write new tokens into their slots. Padding (segment 0) is not written."""
        slots = self.positions.shape[1]
        slot_BT = jnp.where(places.segments != 0, places.positions % slots, slots)
        row_B1 = jnp.arange(slot_BT.shape[0])[:, None]
        return KVCache(
            self.k.at[row_B1, slot_BT].set(k_BTKH.astype(self.k.dtype), mode="drop"),
            self.v.at[row_B1, slot_BT].set(v_BTKH.astype(self.v.dtype), mode="drop"),
            self.positions.at[row_B1, slot_BT].set(places.positions.astype(jnp.int32), mode="drop"),
        )
