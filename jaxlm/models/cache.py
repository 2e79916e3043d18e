"""What a decoder remembers between calls: an explicit pytree, handed in and handed back.

Shapes: B batch, T new tokens, S slots, W slots of a window, F retained first tokens, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.ops.attention.visible import Places


class Slots(NamedTuple):
    """Keys and values as a cache keeps them, and which token each slot holds."""

    keys: Float[Array, "*r b k h s"]
    values: Float[Array, "*r b k s h"]
    positions: Int[Array, "*r b s"]
    """Position of the token in each slot, -1 when empty or padding."""

    @classmethod
    def empty(cls, batch: int, slots: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike) -> Slots:
        """Slots that hold nothing."""
        return cls(
            jnp.zeros((batch, n_kv_heads, head_dim, slots), dtype),
            jnp.zeros((batch, n_kv_heads, slots, head_dim), dtype),
            jnp.full((batch, slots), -1, jnp.int32),
        )

    @property
    def places(self) -> Places:
        """Positions and segments of the slots: 1 when filled, 0 when empty."""
        return Places(self.positions, (self.positions >= 0).astype(jnp.int32))

    def write(self, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, slots_BT: Array) -> Slots:
        """Write each token into the slot of its row; a slot beyond the last is none. No two tokens share one."""
        (b, t), size = slots_BT.shape, self.positions.shape[1]
        rows = jnp.arange(b)[:, None]
        positions = self.positions.at[rows, slots_BT].set(positions_BT, mode="drop")
        if t == 1:
            keys = self.keys.at[rows, :, :, slots_BT].set(k_BTKH.astype(self.keys.dtype), mode="drop")
            values = self.values.at[rows, :, slots_BT].set(v_BTKH.astype(self.values.dtype), mode="drop")
            return Slots(keys, values, positions)
        # Many tokens: each slot takes its own, which moves whole vectors at once where a scatter goes token by token.
        token_BS = jnp.full((b, size), -1).at[rows, slots_BT].set(jnp.arange(t), mode="drop")
        new, take = token_BS >= 0, jax.vmap(lambda x, at: x[at])
        k_BSKH, v_BSKH = take(k_BTKH, token_BS), take(v_BTKH, token_BS)
        k_BKHS = jnp.transpose(k_BSKH, (0, 2, 3, 1)).astype(self.keys.dtype)
        v_BKSH = jnp.transpose(v_BSKH, (0, 2, 1, 3)).astype(self.values.dtype)
        keys = jnp.where(new[:, None, None, :], k_BKHS, self.keys)
        return Slots(keys, jnp.where(new[:, None, :, None], v_BKSH, self.values), positions)


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
        return cls(*Slots.empty(batch, slots, n_kv_heads, head_dim, dtype), jnp.zeros((), jnp.int32))

    def extend(self, k_BTKH: Array, v_BTKH: Array, places: Places) -> tuple[Slots, KVCache]:
        """What the new tokens attend to, and the cache after them."""
        cache = self.append(k_BTKH, v_BTKH, places)
        return Slots(*cache[:3]), cache

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


class WindowCache(NamedTuple):
    """The newest W tokens of each row, and its first F: memory is the window, not the text. A row holds one document.

    The slot of a token is its position modulo W, so that it takes the place of the one that has left the window, in
    rows of any lengths; padding takes no slot. The first tokens have slots of their own. With W larger than the window
    by some tokens, so many of the newest may be taken back: what they replaced had left the window by then.
    """

    window: Slots
    first: Slots

    @classmethod
    def empty(
        cls, batch: int, window: int, keep_first: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> WindowCache:
        """A cache that has seen nothing."""
        return cls(*(Slots.empty(batch, slots, n_kv_heads, head_dim, dtype) for slots in (window, keep_first)))

    def extend(self, k_BTKH: Array, v_BTKH: Array, places: Places) -> tuple[Slots, WindowCache]:
        """What the new tokens attend to, within the window, and the cache after them.

        One token attends to the cache as it will be. Several attend to the cache as it was, and to one another besides.
        """
        real_BT, size = places.segments != 0, self.window.positions.shape[1]
        positions_BT = jnp.where(real_BT, places.positions, -1).astype(jnp.int32)
        newest_B1 = jnp.max(positions_BT, axis=1, keepdims=True)
        slots_BT = jnp.where(real_BT & (positions_BT > newest_B1 - size), positions_BT % size, size)
        window = self.window.write(k_BTKH, v_BTKH, positions_BT, slots_BT)
        first = self.first
        if first.positions.shape[1]:
            first = first.write(
                k_BTKH, v_BTKH, positions_BT, jnp.where(real_BT, positions_BT, first.positions.shape[1])
            )
        if places.positions.shape[1] == 1:
            return window, WindowCache(window, first)
        # What stands at the new tokens' positions or later was taken back, and is not what they attend to.
        from_B1 = jnp.min(jnp.where(real_BT, positions_BT, jnp.iinfo(jnp.int32).max), axis=1, keepdims=True)
        held_BS = jnp.where(self.window.positions < from_B1, self.window.positions, -1)
        return self.window._replace(positions=held_BS), WindowCache(window, first)


class RowCache(NamedTuple):
    """Rows of S slots, each for one text: slot s holds the token at position s, so rows begin and end on their own.

    Tokens are written from left to right without a gap. What lies behind the last token, of a text before or of a
    cut, is later than every query and never seen; it is overwritten as the text grows.
    """

    keys: Float[Array, "*q r k h s"]
    values: Float[Array, "*q r k s h"]
    row: Int[Array, "*q"]
    """The first row that a call is about: one row where the call has one, row 0 where it has all."""

    @classmethod
    def empty(cls, rows: int, slots: int, n_kv_heads: int, head_dim: int, dtype: DTypeLike) -> RowCache:
        """Rows that hold nothing."""
        return cls(*Slots.empty(rows, slots, n_kv_heads, head_dim, dtype)[:2], jnp.zeros((), jnp.int32))

    def append(self, k_BTKH: Array, v_BTKH: Array, places: Places) -> RowCache:
        """Write T tokens of B rows at the positions from the first one's on; padding on the right is never seen."""
        k_BKHT = jnp.transpose(k_BTKH, (0, 2, 3, 1)).astype(self.keys.dtype)
        v_BKTH = jnp.transpose(v_BTKH, (0, 2, 1, 3)).astype(self.values.dtype)
        keys, values = self.keys, self.values
        first = 0 if k_BTKH.shape[0] == keys.shape[0] else self.row  # a number, where the call has all rows
        for i in range(k_BTKH.shape[0]):  # each row is one contiguous update in place, where a scatter is none
            at = places.positions[i, 0]
            row = jnp.asarray(first + i, at.dtype)
            zero = jnp.zeros_like(at)
            keys = lax.dynamic_update_slice(keys, k_BKHT[i : i + 1], (row, zero, zero, at))
            values = lax.dynamic_update_slice(values, v_BKTH[i : i + 1], (row, zero, at, zero))
        return RowCache(keys, values, self.row)
