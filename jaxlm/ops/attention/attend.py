"""Scaled dot-product attention: one function, several kernels.

A query sees a key when both belong to the same document (equal segments that are not 0, which is padding), the key does
not lie after it (position), and fewer than `window` tokens back. A query that sees no key gets zero. `xla` is the
readable reference; the others are tested against it, forward and backward.

Keys that are seen by other rules (three kinds of sinks) are other calls: each gives what it mixed and the log-sum-exp
of its scores (`Mixed`), from which `merge` makes one softmax over all of them. So a kernel that gives the log-sum-exp
serves every kind of sink; the others say which calls they refuse.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim,
F retained first tokens, M sink tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops.attention.kernels import KERNELS, Call, choose
from jaxlm.ops.attention.visible import (
    Form,
    Keys,
    Mixed,
    Places,
    capped,
    grouped_heads,
    masked_softmax,
    one_after_other,
    tokens_at,
    tokens_first,
    visible,
)
from jaxlm.ops.site import Site, here
from jaxlm.typed_jax import einsum, tree_map


def attention(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    q_places: Places,
    k_places: Places,
    *,
    impl: str = "auto",
    aligned: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    site: Site | None = None,
) -> Float[Array, "b t n h"]:
    """Causal attention within documents (Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023).

    Args:
        q_places, k_places: positions and segments of queries [B, T] and keys [B, S].
        impl: a name of `kernels.KERNELS`, or `auto` for the first that applies.
        aligned: queries and keys are the same tokens in the same order (no cache), so no key at a later index is seen,
            and the tokens of a document follow one another. All but `xla` need this.
        window: tokens that a query sees, itself included (Beltagy et al. 2020, section 3.1); 0: all before it.
        softcap: scores are bounded, `cap tanh(score / cap)` (Gemma 2, section 2); 0: they are not.

    Returns:
        The mixed values [B, T, N, H], in the dtype of `v`. Softmax runs in float32 or wider.
    """
    site, form = site or here(), Form(window, softcap, v_BSKH.dtype)
    kernel = KERNELS[choose(impl, call_of(site, q_BTNH, aligned, softcap=bool(softcap)))]
    if kernel.whole is not None:
        return kernel.whole(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form, None, site)
    assert kernel.part is not None
    return kernel.part(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form).out


def attend(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    q_places: Places,
    k_places: Places,
    *,
    impl: str = "auto",
    aligned: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    site: Site | None = None,
) -> Mixed:
    """`attention`, to be merged with other keys."""
    call = call_of(site or here(), q_BTNH, aligned, softcap=bool(softcap), merged=True)
    kernel, form = KERNELS[choose(impl, call)], Form(window, softcap, wide(q_BTNH.dtype))
    assert kernel.part is not None
    return kernel.part(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form)


def attend_first(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    places: Places,
    *,
    keep_first: int,
    window: int,
    softcap: float = 0.0,
    earlier: Keys | None = None,
) -> Mixed:
    """Attention to the first tokens of each document, once they have left the window (Xiao et al. 2023, section 3.2).

    Queries and keys are the same tokens in the same order. Each query gathers its F keys, so the cost is O(T F).

    Args:
        earlier: the first F tokens of the document that the row begins within, where it does not begin with one.
    """
    b, t, n, h = q_BTNH.shape
    start_BT = jnp.arange(t) - places.positions  # where the document of each token begins
    at_BTF = start_BT[..., None] + jnp.arange(keep_first)
    inside_BTF = at_BTF < t
    keys = Keys(k_BTKH, v_BTKH, places)
    if earlier is None:
        inside_BTF, at_BTF = inside_BTF & (at_BTF >= 0), jnp.maximum(at_BTF, 0)
    else:
        keys = tree_map(one_after_other, earlier, keys)
        at_BTF = jnp.where(at_BTF >= 0, at_BTF + keep_first, jnp.arange(keep_first))
    at_BTF = jnp.minimum(at_BTF, keys.k.shape[1] - 1)
    k_BTFKH, v_BTFKH, (positions_BTF, segments_BTF) = tree_map(lambda x_BS: tokens_at(x_BS, at_BTF), keys)
    far_BTF = places.positions[..., None] - positions_BTF >= window
    same_BTF = (places.segments[..., None] == segments_BTF) & (places.segments != 0)[..., None]
    mask_BTF = inside_BTF & same_BTF & far_BTF & (positions_BTF == jnp.arange(keep_first))
    q_BTKGH, width = grouped_heads(q_BTNH, k_BTKH.shape[2]), wide(q_BTNH.dtype)
    scores_BKGTF = einsum("btkgh,btfkh->bkgtf", q_BTKGH, k_BTFKH, preferred_element_type=width)
    scores_BKGTF = jnp.where(mask_BTF[:, None, None], capped(scores_BKGTF * h**-0.5, softcap), -jnp.inf)
    weights, lse = masked_softmax(scores_BKGTF)
    out = einsum("bkgtf,btfkh->btkgh", weights.astype(v_BTKH.dtype), v_BTFKH, preferred_element_type=width)
    return Mixed(out.reshape(b, t, n, h), tokens_first(lse))


def attend_sinks(
    q_BTNH: Float[Array, "b t n h"],
    k_MKH: Float[Array, "m k h"],
    v_MKH: Float[Array, "m k h"],
    segments_BT: Int[Array, "b t"],
    *,
    softcap: float = 0.0,
) -> Mixed:
    """Attention to M keys and values that have no place: every token sees them, padding does not."""
    b, t, n, h = q_BTNH.shape
    q_BTKGH, width = grouped_heads(q_BTNH, k_MKH.shape[1]), wide(q_BTNH.dtype)
    scores_BKGTM = einsum("btkgh,mkh->bkgtm", q_BTKGH, k_MKH, preferred_element_type=width)
    real_B11T1 = (segments_BT != 0)[:, None, None, :, None]
    weights, lse = masked_softmax(jnp.where(real_B11T1, capped(scores_BKGTM * h**-0.5, softcap), -jnp.inf))
    out = einsum("bkgtm,mkh->btkgh", weights.astype(v_MKH.dtype), v_MKH, preferred_element_type=width)
    return Mixed(out.reshape(b, t, n, h), tokens_first(lse))


def cached_attention(
    q_BTNH: Float[Array, "b t n h"],
    keys_BKHS: Float[Array, "b k h s"],
    values_BKSH: Float[Array, "b k s h"],
    q_places: Places,
    k_places: Places,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> Float[Array, "b t n h"]:
    """`attention` over keys and values in the order in which a cache keeps them.

    Both products are plain matrix products of the cache as it lies, so a decoding step moves nothing but its query.
    """
    mask_BTS = visible(q_places, k_places, window)
    return cached(q_BTNH, keys_BKHS, values_BKSH, mask_BTS, softcap, values_BKSH.dtype).out


def cached_attend(
    q_BTNH: Float[Array, "b t n h"],
    keys_BKHS: Float[Array, "b k h s"],
    values_BKSH: Float[Array, "b k s h"],
    q_places: Places,
    k_places: Places,
    *,
    window: int = 0,
    beyond: int = 0,
    softcap: float = 0.0,
) -> Mixed:
    """`cached_attention`, to be merged with other keys; `beyond`: only of keys at this distance or further."""
    mask_BTS = visible(q_places, k_places, window, beyond)
    return cached(q_BTNH, keys_BKHS, values_BKSH, mask_BTS, softcap, wide(q_BTNH.dtype))


def call_of(site: Site, q_BTNH: Float[Array, "b t n h"], aligned: bool, **needs: bool) -> Call:
    """A call of attention as the table of kernels sees it; `needs` are `softcap`, `sinks` and `merged`."""
    _, t, _, h = q_BTNH.shape
    return Call(site.platform, q_BTNH.dtype, t, h, aligned, **needs)


def cached(
    q_BTNH: Array, keys_BKHS: Array, values_BKSH: Array, mask_BTS: Array, softcap: float, dtype: DTypeLike
) -> Mixed:
    """Attention to the keys of a cache that `mask_BTS` leaves; the mixed values in `dtype`."""
    (b, t, n, h), (_, k, _, s) = q_BTNH.shape, keys_BKHS.shape
    q_BKRH = einsum("btkgh->bkgth", grouped_heads(q_BTNH, k)).reshape(b, k, -1, h)  # R = G T, all that read one kv head
    scores_BKRS = jnp.matmul(q_BKRH, keys_BKHS, preferred_element_type=wide(q_BTNH.dtype)) * h**-0.5
    scores_BKGTS = capped(scores_BKRS.reshape(b, k, -1, t, s), softcap)
    weights, lse = masked_softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf))
    weights_BKRS = weights.astype(values_BKSH.dtype).reshape(b, k, -1, s)
    out_BKRH = jnp.matmul(weights_BKRS, values_BKSH, preferred_element_type=dtype)
    out_BTNH = einsum("bkgth->btkgh", out_BKRH.reshape(b, k, -1, t, h)).reshape(b, t, n, h)
    return Mixed(out_BTNH, tokens_first(lse))
