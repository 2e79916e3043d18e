"""Causal attention over a sequence that is split along a mesh axis. For use within `jax.shard_map`.

Keys travel, queries stay: with grouped heads they are the smaller part. Which keys, and how, follows from what is seen:

    window of at most half the row     the window - 1 tokens before a device's own, from its neighbours
    a kernel that `rings`              a ring: keys and values pass from device to device, one part at a time
    any other                          all keys and values are gathered (Llama 3, arXiv 2407.21783, section 3.3.2)

The ring (Liu et al. 2023, arXiv 2310.01889) keeps memory linear in the tokens of one device. Tokens are exchanged into
`sequence_parallel.zigzag` order for it, so that with every part of keys that comes by, each device has exactly two
blocks of half its tokens by half its tokens to compute: causal attention costs half the square, on every device the
same.

Shapes: B batch, T tokens of one device, N heads, K kv heads, H head dim, F retained first tokens, C devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxlm.numerics import wide
from jaxlm.ops import sequence_parallel
from jaxlm.ops.attention import attend, blockwise, visible
from jaxlm.ops.attention.kernels import KERNELS, Kernel
from jaxlm.ops.attention.visible import Form, Keys, Mixed, Places, Sees, one_after_other, tokens_at
from jaxlm.ops.site import here
from jaxlm.typed_jax import all_gather, custom_vjp, fori_loop, tree_map

_Tree = TypeVar("_Tree")


def whole(q: Array, k: Array, v: Array, places: Places, *, axis: str, kernel: Kernel, form: Form) -> Array:
    """Attention of a device's tokens by a kernel that gives no log-sum-exp, to all keys that they see."""
    assert kernel.whole is not None
    k, v, k_places = _reach(Keys(k, v, places), axis, form.window)
    return kernel.whole(q, k, v, places, k_places, form, None, here())


def part(q: Array, k: Array, v: Array, places: Places, *, axis: str, kernel: Kernel, form: Form) -> Mixed:
    """Attention of a device's tokens to those of all, with the log-sum-exp of its scores."""
    assert kernel.part is not None
    keys, near = Keys(k, v, places), _near(q.shape[1], axis, form.window)
    if kernel.rings and not near and q.shape[1] % 2 == 0:
        q, keys = sequence_parallel.zigzag((q, keys), axis)
        return sequence_parallel.unzigzag(_ring(q, keys, axis, form), axis)
    k, v, k_places = _reach(keys, axis, form.window)
    if kernel.rings and near:
        return kernel.part(q, k, v, places, k_places, form)
    # A kernel of blocks needs the queries' own tokens at the end of the keys, which gathering does not give.
    gathered = KERNELS["xla"] if kernel.rings else kernel
    assert gathered.part is not None
    out, lse = gathered.part(q, k, v, places, k_places, form._replace(dtype=jnp.dtype(wide(q.dtype))))
    return Mixed(out.astype(form.dtype), lse)


def attend_first(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    places: Places,
    *,
    axis: str,
    keep_first: int,
    window: int,
    softcap: float = 0.0,
) -> Mixed:
    """`ops.attention.attend_first`; the first tokens of a document that began on another device come from there.

    Each device tells its last token at position 0, 1, ... F - 1. A document that goes on beyond a device has its first
    tokens among them, since a later document would have ended it.
    """
    positions_BT, segments_BT = places
    index_F, t = jnp.arange(keep_first), positions_BT.shape[1]
    is_it_BTF = (positions_BT[..., None] == index_F) & (segments_BT != 0)[..., None]
    last_BF = jnp.max(jnp.where(is_it_BTF, jnp.arange(t)[:, None], -1), axis=1)
    kept = tree_map(lambda x_BT: tokens_at(x_BT, jnp.maximum(last_BF, 0)), Keys(k_BTKH, v_BTKH, places))
    kept_C, found_CBF = all_gather((kept, last_BF >= 0), axis)
    devices_C = jnp.arange(found_CBF.shape[0])[:, None, None]
    source_BF = jnp.max(jnp.where(found_CBF & (devices_C < lax.axis_index(axis)), devices_C, -1), axis=0)

    def from_source(x_CBF: Array) -> Array:
        at = jnp.maximum(source_BF, 0).reshape(1, *source_BF.shape, *(1,) * (x_CBF.ndim - 3))
        return jnp.take_along_axis(x_CBF, at, axis=0)[0]

    earlier = tree_map(from_source, kept_C)
    segments_BF = jnp.where(source_BF >= 0, earlier.places.segments, 0)
    earlier = earlier._replace(places=earlier.places._replace(segments=segments_BF))
    return attend.attend_first(
        q_BTNH, k_BTKH, v_BTKH, places, keep_first=keep_first, window=window, softcap=softcap, earlier=earlier
    )


def _near(tokens: int, axis: str, window: int) -> bool:
    """Whether fetching the window costs no more than half of the row."""
    return 0 < 2 * window <= tokens * lax.axis_size(axis)


def _reach(keys: Keys, axis: str, window: int) -> Keys:
    """Every key that a token of this device may see."""
    if not _near(keys.k.shape[1], axis, window):
        return sequence_parallel.gather(keys, axis)

    def with_halo(x_BT: Array) -> Array:
        return one_after_other(sequence_parallel.halo(x_BT, window - 1, axis), x_BT)

    return tree_map(with_halo, keys)


# The ring. Of the two blocks for the keys of device s on device r, one is late queries by early keys. The other is
# early by early where s is before r, late by late where it is behind. The backward pass goes round again: gradients of
# keys and values travel with them, and come home with the last step.


RingKept = tuple[Array, Keys, Array, Array]
"""Queries, keys, and what `_ring` returned."""
Queries = tuple[Array, Places, Array, Array, Mixed]
"""Queries with their places, what they mixed, its log-sum-exp [B, T, N, 1], and the gradient of both."""
Gradients = tuple[Array, tuple[Array, Array]]
"""Of queries, and of keys and values."""


@custom_vjp(2, 3)
def _ring(q_BTNH: Array, keys: Keys, axis: str, form: Form) -> Mixed:
    return _ring_forward(q_BTNH, keys, axis, form)[0]


def _ring_forward(q_BTNH: Array, keys: Keys, axis: str, form: Form) -> tuple[Mixed, RingKept]:
    wide_form = form._replace(dtype=wide(q_BTNH.dtype))
    queries = (q_BTNH, keys.places)

    def block(queries: tuple[Array, Places], keys: Keys, sees: Sees = "all") -> Mixed:
        (q, q_places), (k, v, k_places) = queries, keys
        return blockwise.blockwise_forward(q, k, v, q_places, k_places, wide_form._replace(sees=sees))[0]

    def visit(hops: Array | int, mixed: Mixed, keys: Keys) -> Mixed:
        behind = hops <= lax.axis_index(axis)
        (early_q, late_q), (early_k, late_k) = _halves(queries), _halves(keys)
        early, late = _halves(mixed)
        late = _add(late, block(late_q, early_k))
        other = block(_choose(behind, early_q, late_q), _choose(behind, early_k, late_k))
        early = _add(early, other._replace(lse=jnp.where(behind, other.lse, -jnp.inf)))
        late = _add(late, other._replace(lse=jnp.where(behind, -jnp.inf, other.lse)))
        return _joined(early, late)

    out, lse = _around(visit, block(queries, keys, "before"), keys, axis)
    out = out.astype(form.dtype)
    return Mixed(out, lse), (q_BTNH, keys, out, lse)


def _ring_backward(axis: str, form: Form, kept: RingKept, cotangents: Mixed) -> tuple[Array, Keys]:
    q_BTNH, keys, out_BTNH, lse_BTN = kept
    n_kv_heads, width = keys.k.shape[2], wide(q_BTNH.dtype)
    queries = (q_BTNH, keys.places, out_BTNH, lse_BTN[..., None], cotangents)

    def block(queries: Queries, keys: Keys, sees: Sees = "all") -> Gradients:
        (q, q_places, out, lse, cotangents), (k, v, k_places) = queries, keys
        q, out, lse = (visible.heads_first(x, n_kv_heads) for x in (q, out, lse))
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        laid_out = blockwise.Kept(q, k, v, q_places, k_places, out, lse)
        dq, dk, dv = blockwise.blockwise_gradients(laid_out, cotangents, form._replace(sees=sees), width)
        return dq, (dk, dv)

    def visit(hops: Array | int, gradients: Gradients, keys: Keys) -> Gradients:
        behind = hops <= lax.axis_index(axis)
        (early_q, late_q), (early_k, late_k) = _halves(queries), _halves(keys)
        dq, dkv = gradients
        dq_late, dkv_early = block(late_q, early_k)
        dq_other, dkv_other = block(_choose(behind, early_q, late_q), _choose(behind, early_k, late_k))
        zero = tree_map(jnp.zeros_like, (dq_other, dkv_other))
        of_early = _choose(behind, (dq_other, dkv_other), zero)
        of_late = _choose(behind, zero, (dq_other, dkv_other))
        new = _joined((of_early[0], _sum(dkv_early, of_early[1])), (_sum(dq_late, of_late[0]), of_late[1]))
        return _sum((dq, sequence_parallel.shift(dkv, axis, around=True)), new)

    dq, dkv = _around(visit, block(queries, keys, "before"), keys, axis)
    dk, dv = sequence_parallel.shift(dkv, axis, around=True)
    no_places: Any = None
    return dq.astype(q_BTNH.dtype), Keys(dk.astype(keys.k.dtype), dv.astype(keys.v.dtype), no_places)


_ring.defvjp(_ring_forward, _ring_backward)


def _around(visit: Callable[[Array | int, _Tree, Keys], _Tree], carry: _Tree, keys: Keys, axis: str) -> _Tree:
    """`carry = visit(hops, carry, keys)` for the keys of each other device; the next ones are under way meanwhile."""
    devices = lax.axis_size(axis)

    def step(hops: Array, state: tuple[_Tree, Keys]) -> tuple[_Tree, Keys]:
        carry, keys = state
        return visit(hops, carry, keys), sequence_parallel.shift(keys, axis, around=True)

    state = (carry, sequence_parallel.shift(keys, axis, around=True))
    carry, keys = fori_loop(1, devices - 1, step, state) if devices > 2 else state
    return visit(devices - 1, carry, keys)


def _halves(tree: _Tree) -> tuple[_Tree, _Tree]:
    """Early and late tokens of arrays in zigzag order."""
    half = jax.tree.leaves(tree)[0].shape[1] // 2
    return tree_map(lambda x_BT: x_BT[:, :half], tree), tree_map(lambda x_BT: x_BT[:, half:], tree)


def _joined(early: _Tree, late: _Tree) -> _Tree:
    return tree_map(one_after_other, early, late)


def _choose(condition: Array, one: _Tree, other: _Tree) -> _Tree:
    return tree_map(lambda x, y: jnp.where(condition, x, y), one, other)


def _sum(one: _Tree, other: _Tree) -> _Tree:
    return tree_map(jnp.add, one, other)


def _add(one: Mixed, other: Mixed) -> Mixed:
    """One softmax over the keys of both."""
    top = jnp.maximum(one.lse, other.lse)
    top = jnp.where(jnp.isfinite(top), top, 0)
    weight, other_weight = jnp.exp(one.lse - top), jnp.exp(other.lse - top)
    total = weight + other_weight
    out = one.out * weight[..., None] + other.out * other_weight[..., None]
    return Mixed(out / jnp.where(total > 0, total, 1)[..., None], jnp.log(total) + top)
