"""What a decoder remembers between calls: an explicit pytree, handed in and handed back.

Shapes: B batch, T new tokens, S slots, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention import Places


class KVCache(NamedTuple):
    """A ring of S slots that all rows fill side by side, in the order of the calls. A row holds one document.

    `positions` tells which token a slot holds, so rows of different lengths share the slots and every write is one
    contiguous update in place. The axes lie as the two products of attention read them: a step transposes no cache.
    """

    keys: Float[Array, "*r b k h s"]
    values: Float[Array, "*r b k s h"]
    positions: Int[Array, "*r b s"]
    """Position of the token in each slot, -1 when empty or padding."""
    written: Int[Array, "*r"]
    """Number of slots written so far; the next one is this modulo S."""

    @classmethod
    def empty(cls, batch: int, slots: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike) -> KVCache:
        """A cache that has seen nothing."""
        return cls(
            jnp.zeros((batch, n_kv_heads, head_dim, slots), dtype),
            jnp.zeros((batch, n_kv_heads, slots, head_dim), dtype),
            jnp.full((batch, slots), -1, jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    @property
    def places(self) -> Places:
        """Positions and segments of the slots: 1 when filled, 0 when empty."""
        return Places(self.positions, (self.positions >= 0).astype(jnp.int32))

    def append(self, k_BTKH: Array, v_BTKH: Array, places: Places) -> KVCache:
        """Write T new tokens side by side. Padding (segment 0) takes a slot but is never seen.

        A single token overwrites the oldest slot of a full ring; several at once must end within the ring, which is the
        caller's care: (written mod S) + T <= S.
        """
        slots = self.positions.shape[1]
        at = self.written % slots
        zero = jnp.zeros_like(at)
        positions_BT = jnp.where(places.segments != 0, places.positions, -1).astype(jnp.int32)
        k_BKHT = jnp.transpose(k_BTKH, (0, 2, 3, 1)).astype(self.keys.dtype)
        v_BKTH = jnp.transpose(v_BTKH, (0, 2, 1, 3)).astype(self.values.dtype)
        return KVCache(
            lax.dynamic_update_slice(self.keys, k_BKHT, (zero, zero, zero, at)),
            lax.dynamic_update_slice(self.values, v_BKTH, (zero, zero, at, zero)),
            lax.dynamic_update_slice(self.positions, positions_BT, (zero, at)),
            self.written + k_BTKH.shape[1],
        )
