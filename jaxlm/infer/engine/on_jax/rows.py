"""The rows of an engine's cache: made empty, looked at one by one, kept and put back.

A cache is a tuple of what the layers remember, stacked over repeats where they are scanned. Three kinds, by mixer:

* `RowCache` (full attention): slots by position. Kept are the slots of a chunk; cutting back needs nothing.
* `WindowCache`: the newest tokens, and the first ones. Kept is the whole, as it is after a chunk.
* `MambaCache`, `Mamba2Cache`: a state of fixed size. Kept is the whole, as it is after a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxlm.models.block import MIXERS
from jaxlm.models.cache import RowCache, WindowCache
from jaxlm.models.decoder import Cache, Decoder
from jaxlm.models.mamba import Mamba2Cache, MambaCache

SLOTS = ((None, "kv_heads", None, None), (None, "kv_heads", None, None), (None, None))
AXES: Mapping[type, tuple[tuple[str | None, ...], ...]] = {
    RowCache: (*SLOTS[:2], ()),
    MambaCache: ((None, None, "inner"), (None, None, "inner")),
    Mamba2Cache: ((None, None, "inner"), (None, None, None), (None, "heads", None, None)),
}
"""Logical axes of the leaves of a layer's cache, without that of repeats: rows are whole."""


class Kept(NamedTuple):
    """What a row has after a chunk of its prompt."""

    chunk: Any
    """Keys and values of the chunk's tokens, for each full-attention layer: with those of the chunks before."""
    state: Any
    """What the other layers have, whole."""


def empty_rows(decoder: Decoder, rows: int, slots: int, room: int = 0) -> Cache:
    """A cache of `rows` texts of up to `slots` tokens each, of which windows may take back `room`."""
    cfg = decoder.config
    kinds = cfg.pattern if cfg.scanned else cfg.pattern * cfg.repeats
    layers = []
    for kind in kinds:
        halves = cfg.halves(kind)
        mixer = MIXERS[halves.mixer_name]
        sizes = halves.mixer, decoder.policy, rows, slots
        layers.append(mixer.empty_rows(*sizes, room) if hasattr(mixer, "empty_rows") else mixer.empty_cache(*sizes))
    if not cfg.scanned:
        return tuple(layers)
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (cfg.repeats, *leaf.shape)), tuple(layers))


def row_axes(decoder: Decoder, cache: Cache) -> Any:
    """The tree of the logical axes of every leaf: what a mesh splits of a row."""
    repeats = ("layers",) if decoder.config.scanned else ()
    axes = [
        (*repeats, *leaf)
        for layer in cache
        for leaf in (SLOTS * 2 if isinstance(layer, WindowCache) else AXES[type(layer)])
    ]
    return jax.tree.unflatten(jax.tree.structure(cache), axes)


def one_row(decoder: Decoder, cache: Cache, row: Int[Array, ""]) -> Cache:
    """The cache of a call with one row: full attention keeps all rows and knows which, the others are cut out."""

    def cut(layer: Any) -> Any:
        if isinstance(layer, RowCache):
            return layer._replace(row=jnp.full_like(layer.row, row))
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, row, 1, _axis(decoder)), layer)

    return tuple(cut(layer) for layer in cache)


def put_row(decoder: Decoder, cache: Cache, row: Int[Array, ""], part: Cache) -> Cache:
    """The whole cache after a call with one row."""

    def put(layer: Any, after: Any) -> Any:
        if isinstance(layer, RowCache):
            return after._replace(row=layer.row)
        return jax.tree.map(
            lambda leaf, new: lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), row, _axis(decoder)),
            layer,
            after,
        )

    return tuple(put(layer, after) for layer, after in zip(cache, part, strict=True))


def has_states(cache: Cache) -> bool:
    """Whether a layer has a state, which cannot be cut back."""
    return not all(isinstance(layer, RowCache | WindowCache) for layer in cache)


def before_states(cache: Cache, after: Cache) -> Cache:
    """The cache after some tokens, but with the states from before them: for tokens that are fed again."""
    return tuple(new if isinstance(new, RowCache | WindowCache) else old for old, new in zip(cache, after, strict=True))


def reset_row(decoder: Decoder, cache: Cache, row: Int[Array, ""], scrub: Int[Array, ""]) -> Cache:
    """The cache with an empty row.

    Slots by position need no emptying, but where a text ended in numbers that are none: `scrub` overwrites them too.
    """

    def clear(layer: Any) -> Any:
        if not isinstance(layer, RowCache):
            part = one_row(decoder, (layer,), row)[0]
            return put_row(decoder, (layer,), row, (_blank(part),))[0]

        def overwrite(layer: RowCache) -> RowCache:
            put = lambda leaf: lax.dynamic_update_slice_in_dim(  # noqa: E731
                leaf, jnp.zeros_like(lax.dynamic_slice_in_dim(leaf, row, 1, _axis(decoder))), row, _axis(decoder)
            )
            return RowCache(put(layer.keys), put(layer.values), layer.row)

        return lax.cond(scrub != 0, overwrite, lambda layer: layer, layer)

    return tuple(clear(layer) for layer in cache)


def keep(decoder: Decoder, cache: Cache, row: Int[Array, ""], start: Int[Array, ""], size: int) -> Kept:
    """What the row has after the chunk of `size` tokens from `start` on, which must be the last one written."""
    chunk, state = [], []
    for layer in cache:
        if isinstance(layer, RowCache):
            keys, values = (lax.dynamic_slice_in_dim(leaf, row, 1, _axis(decoder)) for leaf in layer[:2])
            cut = lambda leaf, axis: lax.dynamic_slice_in_dim(leaf, start, size, leaf.ndim + axis)  # noqa: E731
            chunk.append((cut(keys, -1), cut(values, -2)))
        else:
            state.append(one_row(decoder, (layer,), row)[0])
    return Kept(tuple(chunk), tuple(state))


def put_back(decoder: Decoder, cache: Cache, row: Int[Array, ""], start: Int[Array, ""], kept: Kept) -> Cache:
    """The cache with a chunk of `keep` in a row, at `start`; the states are those after this chunk."""
    chunks, states, layers = iter(kept.chunk), iter(kept.state), []
    for layer in cache:
        if not isinstance(layer, RowCache):
            layers += put_row(decoder, (layer,), row, (next(states),))
            continue
        zeros = [jnp.zeros_like(row)] * layer.keys.ndim

        def put(leaf: Array, new: Array, axis: int, zeros: list[Array] = zeros) -> Array:
            at = [*zeros]
            at[_axis(decoder)], at[leaf.ndim + axis] = row, start
            return lax.dynamic_update_slice(leaf, new, at)

        keys, values = next(chunks)
        layers.append(RowCache(put(layer.keys, keys, -1), put(layer.values, values, -2), layer.row))
    return tuple(layers)


def _axis(decoder: Decoder) -> int:
    """The axis of rows."""
    return 1 if decoder.config.scanned else 0


def _blank(part: Any) -> Any:
    """What a layer that is no `RowCache` has before the first token."""
    if not isinstance(part, WindowCache):
        return jax.tree.map(jnp.zeros_like, part)
    return WindowCache(*(slots._replace(positions=jnp.full_like(slots.positions, -1)) for slots in part))
