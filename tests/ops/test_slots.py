"""Attention over slots by position: blocks of two sizes, rows of different lengths, padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.attention.slots import BLOCK, SHORT, SHORT_BLOCK, attend_slots, block_of
from jaxlm.ops.attention.visible import Places

LASTS = (0, SHORT_BLOCK - 1, SHORT_BLOCK, BLOCK + 3)


def attended(slots: int, lasts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of one query a row, and of a dense softmax over the slots up to it; -1: the row rests."""
    rng, r = np.random.default_rng(0), len(lasts)
    q, keys, values = (rng.standard_normal(shape) for shape in ((r, 1, 4, 8), (r, 2, 8, slots), (r, 2, slots, 8)))
    last = np.asarray(lasts)[:, None]
    places = Places(jnp.asarray(np.maximum(last, 0)), jnp.asarray(last >= 0, jnp.int32))
    q_BTNH, keys_RKHS, values_RKSH = (jnp.asarray(x, jnp.float32) for x in (q, keys, values))
    ours = attend_slots(q_BTNH, keys_RKHS, values_RKSH, places, jnp.int32(0)).out
    expected = np.zeros_like(q)
    for row, end in enumerate(lasts):
        for head in range(4 * (end >= 0)):
            scores = q[row, 0, head] @ keys[row, head // 2, :, : end + 1] / 8**0.5
            expected[row, 0, head] = jax.nn.softmax(jnp.asarray(scores)) @ values[row, head // 2, : end + 1]
    return np.asarray(ours), expected


@pytest.mark.parametrize("slots", [SHORT, SHORT + BLOCK])
def test_a_dense_softmax(slots: int) -> None:
    assert block_of(slots) == (SHORT_BLOCK if slots == SHORT else BLOCK)
    ours, expected = attended(slots, (*LASTS, -1, slots - 1))
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("slots", [SHORT, SHORT + BLOCK])
def test_no_row_depends_on_its_neighbours(slots: int) -> None:
    """Bit for bit: how many blocks are read is the longest row's affair."""
    short, _ = attended(slots, (5, 7, 9))
    beside, _ = attended(slots, (5, slots - 1, 9))
    assert (short[0] == beside[0]).all() and (short[2] == beside[2]).all()
