"""The rows of an engine's cache: made empty, looked at one by one, kept and put back. All are written in place.

Three kinds, by mixer, as in `jaxlm.infer.engine.on_jax.rows`: `RowCache` has slots by position, of which those of a
chunk are kept; `WindowCache` and the states of Mamba are kept whole, as they are after a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from torch_ref.models.cache import KVCache, RowCache, Slots, WindowCache
from torch_ref.models.decoder import Cache, Decoder, init_cache


def empty_rows(decoder: Decoder, rows: int, slots: int, room: int = 0) -> Cache:
    """A cache of `rows` texts of up to `slots` tokens each, of which windows may take back `room`."""

    def make(layer: Any) -> Any:
        if isinstance(layer, KVCache):
            return RowCache(layer.keys, layer.values, 0)
        if not isinstance(layer, WindowCache):
            return layer
        (_, heads, width, size), keys = layer.window.keys.shape, layer.window.keys
        return layer._replace(window=Slots.empty(rows, min(slots, size + room), heads, width, keys.dtype, keys.device))

    return tuple(make(layer) for layer in init_cache(decoder, rows, slots))


def has_states(cache: Cache) -> bool:
    """Whether a layer has a state, which cannot be cut back."""
    return not all(isinstance(layer, RowCache | WindowCache) for layer in cache)


def before_states(cache: Cache, after: Cache) -> Cache:
    """The cache after some tokens, but with the states from before them: for tokens that are fed again."""
    return tuple(new if isinstance(new, RowCache | WindowCache) else old for old, new in zip(cache, after, strict=True))


def one_row(cache: Cache, row: int) -> Cache:
    """The cache of a call with one row: views of its tensors."""

    def view(layer: Any) -> Any:
        if isinstance(layer, RowCache):
            return layer._replace(row=row)
        if isinstance(layer, WindowCache):
            return WindowCache(*(type(slots)(*(leaf[row : row + 1] for leaf in slots)) for slots in layer))
        return type(layer)(*(leaf[row : row + 1] for leaf in layer))

    return tuple(view(layer) for layer in cache)


def put_row(part: Cache, after: Cache) -> None:
    """Write the states after a call with one row into the views that it was given; slots are written already."""
    for views, leaves in zip(part, after, strict=True):
        if not isinstance(views, RowCache | WindowCache):
            for view, leaf in zip(views, leaves, strict=True):
                view.copy_(leaf)


def reset_row(cache: Cache, row: int, scrub: bool) -> None:
    """Empty a row. Slots by position need it only where a text ended in numbers that are none: `scrub`."""
    for layer in one_row(cache, row):
        if scrub or not isinstance(layer, RowCache):
            for name, leaf in _leaves(layer):
                leaf.fill_(-1 if name == "positions" else 0)


def keep(cache: Cache, row: int, start: int, size: int) -> list[list[Tensor]]:
    """What the row has after the chunk of `size` tokens from `start` on, which must be the last one written."""
    return [[leaf.clone() for _, leaf in _leaves(layer, start, size)] for layer in one_row(cache, row)]


def put_back(cache: Cache, row: int, start: int, kept: list[list[Tensor]], size: int) -> None:
    """Put a chunk of `keep` into a row, at `start`; the states are those after this chunk."""
    for layer, values in zip(one_row(cache, row), kept, strict=True):
        for (_, leaf), value in zip(_leaves(layer, start, size), values, strict=True):
            leaf.copy_(value)


def _leaves(layer: Any, start: int = 0, size: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one row with their names; of slots by position `size` from `start` on."""
    if isinstance(layer, RowCache):
        at = slice(start, None if size is None else start + size)
        yield from (("keys", layer.keys[layer.row, :, :, at]), ("values", layer.values[layer.row, :, at]))
    elif isinstance(layer, WindowCache):
        yield from (pair for slots in layer for pair in zip(slots._fields, slots, strict=True))
    else:
        yield from zip(layer._fields, layer, strict=True)
