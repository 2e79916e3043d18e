"""Attention over the slots of rows, where slot s of a row holds the token at position s.

The keys are read block by block, as far as the longest row reaches, under one running softmax (Milakov & Gimelshein
2018): a step costs what the tokens that are there cost, not the room for more. What lies behind a row's last token is
never seen, because it is later than every query; a block that a row does not see leaves its result as it is, bit for
bit, so a row does not depend on how long its neighbours are.

Shapes: B batch, T query length, R rows, S slots, N heads, K kv heads, G = N/K queries of one kv head, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops.attention.visible import Mixed, Places
from jaxlm.typed_jax import einsum, fori_loop

SHORT_BLOCK, BLOCK = 128, 256
"""Slots that are read at once, in short rows and in long ones; the number of slots is a multiple of `block_of`."""
SHORT = 1024
"""Slots of a short row, at most."""


class _Sums(NamedTuple):
    """The running softmax: largest score, sum of exponentials, sum of values weighted by them."""

    top: Float[Array, "b k q"]
    total: Float[Array, "b k q"]
    out: Float[Array, "b k q h"]


def block_of(slots: int) -> int:
    """Slots that are read at once in rows of so many: a short row is often read no further than its first block."""
    return SHORT_BLOCK if slots <= SHORT else BLOCK


def attend_slots(
    q_BTNH: Float[Array, "b t n h"],
    keys_RKHS: Float[Array, "r k h s"],
    values_RKSH: Float[Array, "r k s h"],
    places: Places,
    row: Int[Array, ""],
    *,
    softcap: float = 0.0,
) -> Mixed:
    """Causal attention of B rows from `row` on to their own slots, those of the queries' own tokens included.

    Args:
        places: of the queries; segment 0 is padding, which gets zero.
        row: the first row; 0 where B = R.
        softcap: scores are bounded, `cap tanh(score / cap)`; 0: they are not.
    """
    (b, t, n, h), k = q_BTNH.shape, keys_RKHS.shape[1]
    width, size = wide(q_BTNH.dtype), block_of(keys_RKHS.shape[-1])
    q_BKQH = einsum("btkgh->bkgth", q_BTNH.reshape(b, t, k, n // k, h)).reshape(b, k, -1, h)  # Q = G T
    last_BT = jnp.where(places.segments != 0, places.positions, -1)
    first_row = jnp.zeros_like(row) if b == keys_RKHS.shape[0] else row  # known to the compiler, where it can be

    def read(block: Array, sums: _Sums) -> _Sums:
        start, zero = (block * size).astype(row.dtype), jnp.zeros_like(row)
        keys_BKHS = lax.dynamic_slice(keys_RKHS, (first_row, zero, zero, start), (b, k, h, size))
        values_BKSH = lax.dynamic_slice(values_RKSH, (first_row, zero, start, zero), (b, k, size, h))
        scores_BKQS = jnp.matmul(q_BKQH, keys_BKHS, preferred_element_type=width) * h**-0.5
        scores_BKQS = softcap * jnp.tanh(scores_BKQS / softcap) if softcap else scores_BKQS
        seen_BTS = start + jnp.arange(size) <= last_BT[..., None]
        seen_BKQS = jnp.broadcast_to(seen_BTS[:, None, None], (b, 1, n // k, t, size)).reshape(b, 1, -1, size)
        scores_BKQS = jnp.where(seen_BKQS, scores_BKQS, -jnp.inf)

        # What was summed so far shrinks by the rise of the largest score.
        top_BKQ = jnp.maximum(sums.top, jnp.max(scores_BKQS, axis=-1))
        finite_BKQ = jnp.where(jnp.isfinite(top_BKQ), top_BKQ, 0)
        weights_BKQS = jnp.exp(scores_BKQS - finite_BKQ[..., None])
        shrink_BKQ = jnp.exp(sums.top - finite_BKQ)
        new_BKQH = jnp.matmul(weights_BKQS.astype(values_BKSH.dtype), values_BKSH, preferred_element_type=width)
        total_BKQ = sums.total * shrink_BKQ + jnp.sum(weights_BKQS, axis=-1)
        return _Sums(top_BKQ, total_BKQ, sums.out * shrink_BKQ[..., None] + new_BKQH)

    # Nothing is seen before the first block.
    empty = jnp.zeros(q_BKQH.shape[:3], width)
    first = _Sums(empty - jnp.inf, empty, jnp.zeros(q_BKQH.shape, width))
    blocks = jnp.max(last_BT) // size + 1
    top_BKQ, total_BKQ, out_BKQH = fori_loop(0, blocks, read, first)

    some_BKQ = jnp.where(total_BKQ > 0, total_BKQ, 1)
    lse_BKQ = jnp.where(total_BKQ > 0, jnp.log(some_BKQ) + top_BKQ, -jnp.inf)
    out_BTNH = einsum("bkgth->btkgh", (out_BKQH / some_BKQ[..., None]).reshape(b, k, -1, t, h))
    lse_BTN = einsum("bkgt->btkg", lse_BKQ.reshape(b, k, -1, t)).reshape(b, t, n)
    return Mixed(out_BTNH.reshape(b, t, n, h), lse_BTN)
