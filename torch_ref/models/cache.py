"""What a decoder remembers between calls: explicit tensors, handed in and handed back.

Shapes: B batch, T new tokens, S slots, W slots of a window, F retained first tokens, K kv heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.ops.attention.attend import Places


class Slots(NamedTuple):
    """Keys and values as a cache keeps them, and which token each slot holds."""

    keys: Float[Tensor, "b k h s"]
    values: Float[Tensor, "b k s h"]
    positions: Int[Tensor, "b s"]
    """Position of the token in each slot, -1 when empty or padding."""

    @classmethod
    def empty(
        cls,
        batch: int,
        slots: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Slots:
        """Slots that hold nothing."""
        return cls(
            torch.zeros(batch, n_kv_heads, head_dim, slots, dtype=dtype, device=device),
            torch.zeros(batch, n_kv_heads, slots, head_dim, dtype=dtype, device=device),
            torch.full((batch, slots), -1, dtype=torch.int32, device=device),
        )

    @property
    def places(self) -> Places:
        """Positions and segments of the slots: 1 when filled, 0 when empty."""
        return Places(self.positions, (self.positions >= 0).int())

    def write(self, k_BTKH: Tensor, v_BTKH: Tensor, positions_BT: Tensor, slots_BT: Tensor) -> None:
        """Write each token into the slot of its row, in place; a slot beyond the last is none. No two share one."""
        rows, tokens = (slots_BT < self.positions.shape[1]).nonzero(as_tuple=True)
        slots = slots_BT[rows, tokens].long()
        self.keys[rows, :, :, slots] = k_BTKH[rows, tokens].to(self.keys.dtype)
        self.values[rows, :, slots] = v_BTKH[rows, tokens].to(self.values.dtype)
        self.positions[rows, slots] = positions_BT[rows, tokens]


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
        held = Slots.empty(batch, slots, n_kv_heads, head_dim, dtype, device)
        return cls(*held, torch.zeros((), dtype=torch.int32, device=device))

    def extend(self, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> tuple[Slots, KVCache]:
        """What the new tokens attend to, and the cache after them."""
        cache = self.append(k_BTKH, v_BTKH, places)
        return Slots(*cache[:3]), cache

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
        cls,
        batch: int,
        window: int,
        keep_first: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> WindowCache:
        """A cache that has seen nothing."""
        sizes = n_kv_heads, head_dim, dtype, device
        return cls(Slots.empty(batch, window, *sizes), Slots.empty(batch, keep_first, *sizes))

    def extend(self, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> tuple[Slots, WindowCache]:
        """What the new tokens attend to, within the window, and the cache after them, whose buffers are the same.

        One token attends to the cache as it will be. Several attend to the cache as it was, and to one another besides.
        """
        real_BT, size = places.segments != 0, self.window.positions.shape[1]
        positions_BT = torch.where(real_BT, places.positions, -1).int()
        newest_B1 = positions_BT.amax(dim=1, keepdim=True)
        several = places.positions.shape[1] > 1
        attended = Slots(*(buffer.clone() for buffer in self.window)) if several else self.window
        # What stands at the new tokens' positions or later was taken back, and is not what they attend to.
        from_B1 = torch.where(real_BT, positions_BT, torch.iinfo(torch.int32).max).amin(dim=1, keepdim=True)
        if several:
            attended.positions.masked_fill_(attended.positions >= from_B1, -1)
        slots_BT = torch.where(real_BT & (positions_BT > newest_B1 - size), positions_BT % size, size)
        self.window.write(k_BTKH, v_BTKH, positions_BT, slots_BT)
        keep_first = self.first.positions.shape[1]
        if keep_first:
            self.first.write(k_BTKH, v_BTKH, positions_BT, torch.where(real_BT, positions_BT, keep_first))
        return attended, self


class RowCache(NamedTuple):
    """Rows of S slots, each for one text: slot s holds the token at position s, so rows begin and end on their own.

    Tokens are written from left to right without a gap. What lies behind the last token, of a text before or of a
    cut, is later than every query and never seen; it is overwritten as the text grows.
    """

    keys: Float[Tensor, "r k h s"]
    values: Float[Tensor, "r k s h"]
    row: int
    """The first row that a call is about: one row where the call has one, row 0 where it has all."""

    def extend(self, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> tuple[Slots, RowCache]:
        """What the new tokens attend to, and the cache after them, whose buffers are the same."""
        self.append(k_BTKH, v_BTKH, places)
        b = k_BTKH.shape[0]
        rows = slice(self.row, self.row + b)
        end = (
            int(torch.where(places.segments != 0, places.positions, 0).max()) + 1
        )  # of the longest row: no more is read
        positions_BS = torch.arange(end, dtype=torch.int32, device=self.keys.device).expand(b, end)
        return Slots(self.keys[rows, :, :, :end], self.values[rows, :, :end], positions_BS), self

    def append(self, k_BTKH: Tensor, v_BTKH: Tensor, places: Places) -> None:
        """Write T tokens of B rows into the slots of their positions, in place; padding is not written."""
        real_BT = places.segments != 0
        rows_BT = (self.row + torch.arange(k_BTKH.shape[0], device=real_BT.device))[:, None].expand_as(real_BT)
        rows, slots = rows_BT[real_BT], places.positions[real_BT].long()
        self.keys[rows, :, :, slots] = k_BTKH[real_BT].to(self.keys.dtype)
        self.values[rows, :, slots] = v_BTKH[real_BT].to(self.values.dtype)
