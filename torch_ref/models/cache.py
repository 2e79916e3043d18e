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
    """Ring buffer of keys and values; the token at position p lies in slot p mod S. A row holds one document."""

    k: Float[Tensor, "b s k h"]
    v: Float[Tensor, "b s k h"]
    positions: Int[Tensor, "b s"]
    """Position of the token in each slot, -1 when empty."""

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
        shape = (batch, slots, n_kv_heads, head_dim)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.full((batch, slots), -1, dtype=torch.int32, device=device),
        )

    @property
    def places(self) -> Places:
        """Positions and segments of the slots: 1 when filled, 0 when empty."""
        return Places(self.positions, (self.positions >= 0).int())

    def append(self, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> KVCache:
        """Write new tokens into their slots, in place: what was handed in is used up. Padding is not written."""
        t = places.segments.shape[1]
        real_BT = places.segments != 0
        index_T = torch.arange(t, device=real_BT.device)
        # Without a write that drops, a padding token repeats the write of its row's last real token, and a row that has
        # none writes back what stands there. So all writes to one slot agree.
        last_B1 = (real_BT * (index_T + 1)).argmax(dim=1, keepdim=True)
        source_BT = torch.where(real_BT, index_T, last_B1)
        row_B1 = torch.arange(real_BT.shape[0], device=real_BT.device)[:, None]
        real_BT, positions_BT = real_BT[row_B1, source_BT], places.positions[row_B1, source_BT]
        slot_BT = positions_BT.long() % self.positions.shape[1]
        for buffer, new in ((self.k, k_BTKH), (self.v, v_BTKH)):
            old = buffer[row_B1, slot_BT]
            buffer[row_B1, slot_BT] = torch.where(
                real_BT[..., None, None], new[row_B1, source_BT].to(buffer.dtype), old
            )
        old = self.positions[row_B1, slot_BT]
        self.positions[row_B1, slot_BT] = torch.where(real_BT, positions_BT.int(), old)
        return self
