"""What a decoder remembers between calls: explicit tensors, handed in and handed back.

Shapes: B batch, T new tokens, S slots, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.ops.attention import Places


class KVCache(NamedTuple):
    """A ring of S slots that all rows fill side by side, in the order of the calls. A row holds one document.

    `positions` tells which token a slot holds, so rows of different lengths share the slots. The axes lie as the two
    products of attention read them: a step transposes no cache.
    """

    keys: Float[Tensor, "b k h s"]
    values: Float[Tensor, "b k s h"]
    positions: Int[Tensor, "b s"]
    """Position of the token in each slot, -1 when empty or padding."""
    written: Int[Tensor, ""]
    """Number of slots written so far; the next one is this modulo S."""

    @classmethod
    def empty(
        cls,
        batch: int,
        slots: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """A cache that has seen nothing."""
        return cls(
            torch.zeros(batch, n_kv_heads, head_dim, slots, dtype=dtype, device=device),
            torch.zeros(batch, n_kv_heads, slots, head_dim, dtype=dtype, device=device),
            torch.full((batch, slots), -1, dtype=torch.int32, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
        )

    @property
    def places(self) -> Places:
        """Positions and segments of the slots: 1 when filled, 0 when empty."""
        return Places(self.positions, (self.positions >= 0).int())

    def append(self, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> KVCache:
        """Write T new tokens side by side, in place. Padding (segment 0) takes a slot but is never seen.

        The buffers of the cache handed in are those of the cache handed back: the former must not be used again. A
        single token overwrites the oldest slot of a full ring; several at once must end within the ring, which is the
        caller's care: (written mod S) + T <= S.
        """
        t, slots = places.positions.shape[1], self.positions.shape[1]
        at_T = (self.written + torch.arange(t, device=self.written.device)) % slots
        self.keys.index_copy_(3, at_T, k_BTKH.permute(0, 2, 3, 1).to(self.keys.dtype))
        self.values.index_copy_(2, at_T, v_BTKH.transpose(1, 2).to(self.values.dtype))
        positions_BT = torch.where(places.segments != 0, places.positions, -1)
        self.positions.index_copy_(1, at_T, positions_BT.to(self.positions.dtype))
        return self._replace(written=self.written + t)
