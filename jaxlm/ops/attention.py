"""Scaled dot-product attention: one function, several kernels.

A query sees a key when both belong to the same document (equal segment; 0 is padding), the key does not lie after it
(position), and fewer than `window` tokens back. A query that sees no key gets zero. `xla` is the readable reference;
the others are tested against it, forward and backward.

Keys that are seen by other rules (three kinds of sinks) are other calls: each gives what it mixed and the log-sum-exp
of its scores (`Mixed`), from which `merge` makes one softmax over all of them. So every kernel has every sink.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim,
F retained first tokens, M sink tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxlm.mesh import platform
from jaxlm.numerics import wide
from jaxlm.ops import choice

BLOCK = 128  # least query block of `blockwise`
MAX_BLOCKS = 16  # `blockwise` unrolls at most this many


class Places(NamedTuple):
    """Where tokens stand: position within the document, and the document (segment), 0 for padding."""

    positions: Int[Array, "b s"]
    segments: Int[Array, "b s"]


class Keys(NamedTuple):
    """Keys and values with their places."""

    k: Float[Array, "b s k h"]
    v: Float[Array, "b s k h"]
    places: Places


class Mixed(NamedTuple):
    """What queries take from some of the keys they see, in float32 or wider."""

    out: Float[Array, "b t n h"]
    """Values weighted by the softmax over these keys alone; zero where none is seen."""
    lse: Float[Array, "b t n"]
    """Logarithm of the sum of the exponentials of the scores; -inf where none is seen."""


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
) -> Float[Array, "b t n h"]:
    """Causal attention within documents (Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023).

    Args:
        q_places, k_places: positions and segments of queries [B, T] and keys [B, S].
        impl: `xla`, `blockwise`, `cudnn`, `splash`, or `auto` for the platform that is compiled for. Where one does not
            apply, the next in the table of `ops.choice` takes its place.
        aligned: queries and keys are the same tokens in the same order (no cache), so no key at a later index is seen,
            and the tokens of a document follow one another. All but `xla` need this.
        window: tokens that a query sees, itself included (Beltagy et al. 2020, section 3.1); 0: all before it.
        softcap: scores are bounded, `cap tanh(score / cap)` (Gemma 2, section 2); 0: they are not.

    Returns:
        The mixed values [B, T, N, H], in the dtype of `v`. Softmax runs in float32 or wider.
    """
    impl = choose(impl, q_BTNH, aligned, softcap=bool(softcap))
    if impl == "splash":
        from jaxlm.ops.splash import splash  # loads Pallas, which only TPUs need

        return splash(q_BTNH, k_BSKH, v_BSKH, q_places.segments, window=window, softcap=softcap)
    if impl == "cudnn":
        return cudnn(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, window, aligned)
    return _mixed(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, impl, aligned, window, softcap, v_BSKH.dtype).out


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
) -> Mixed:
    """`attention`, to be merged with other keys."""
    impl = choose(impl, q_BTNH, aligned, softcap=bool(softcap), merged=True)
    width = wide(q_BTNH.dtype)
    return _mixed(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, impl, aligned, window, softcap, width)


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
        keys = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), earlier, keys)
        at_BTF = jnp.where(at_BTF >= 0, at_BTF + keep_first, jnp.arange(keep_first))
    at_BTF = jnp.minimum(at_BTF, keys.k.shape[1] - 1)
    k_BTFKH, v_BTFKH, (positions_BTF, segments_BTF) = jax.tree.map(
        lambda x: jax.vmap(lambda row, at: row[at])(x, at_BTF), keys
    )
    far_BTF = places.positions[..., None] - positions_BTF >= window
    same_BTF = (places.segments[..., None] == segments_BTF) & (places.segments != 0)[..., None]
    mask_BTF = inside_BTF & same_BTF & far_BTF & (positions_BTF == jnp.arange(keep_first))
    q_BTKGH, width = _grouped(q_BTNH, k_BTKH.shape[2]), wide(q_BTNH.dtype)
    scores_BKGTF = jnp.einsum("btkgh,btfkh->bkgtf", q_BTKGH, k_BTFKH, preferred_element_type=width)
    scores_BKGTF = jnp.where(mask_BTF[:, None, None], _capped(scores_BKGTF * h**-0.5, softcap), -jnp.inf)
    weights, lse = _softmax(scores_BKGTF)
    out = jnp.einsum("bkgtf,btfkh->btkgh", weights.astype(v_BTKH.dtype), v_BTFKH, preferred_element_type=width)
    return Mixed(out.reshape(b, t, n, h), _tokens_first(lse))


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
    q_BTKGH, width = _grouped(q_BTNH, k_MKH.shape[1]), wide(q_BTNH.dtype)
    scores_BKGTM = jnp.einsum("btkgh,mkh->bkgtm", q_BTKGH, k_MKH, preferred_element_type=width)
    real_B11T1 = (segments_BT != 0)[:, None, None, :, None]
    weights, lse = _softmax(jnp.where(real_B11T1, _capped(scores_BKGTM * h**-0.5, softcap), -jnp.inf))
    out = jnp.einsum("bkgtm,mkh->btkgh", weights.astype(v_MKH.dtype), v_MKH, preferred_element_type=width)
    return Mixed(out.reshape(b, t, n, h), _tokens_first(lse))


def merge(
    parts: Sequence[Mixed], sink_logits_N: Float[Array, " n"] | None = None, dtype: DTypeLike = jnp.float32
) -> Float[Array, "b t n h"]:
    """One softmax over the keys of all parts, which are disjoint: each part weighs the exponential of its log-sum-exp.

    Args:
        sink_logits_N: a score of each head that takes part in the softmax and has no value (gpt-oss).
        dtype: of the result.
    """
    lse_PBTN = jnp.stack([part.lse for part in parts])
    top_BTN = jnp.max(lse_PBTN, axis=0)
    if sink_logits_N is not None:
        sink_logits_N = sink_logits_N.astype(lse_PBTN.dtype)
        top_BTN = jnp.maximum(top_BTN, sink_logits_N)
    top_BTN = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_BTN), top_BTN, 0))
    weights_PBTN = jnp.exp(lse_PBTN - top_BTN)
    total_BTN = jnp.sum(weights_PBTN, axis=0)
    if sink_logits_N is not None:
        total_BTN = total_BTN + jnp.exp(sink_logits_N - top_BTN)
    weights_PBTN = weights_PBTN / jnp.where(total_BTN > 0, total_BTN, 1)
    out_BTNH: Any = sum(part.out * weight[..., None] for part, weight in zip(parts, weights_PBTN, strict=True))
    return out_BTNH.astype(dtype)


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
    return _cached(q_BTNH, keys_BKHS, values_BKSH, mask_BTS, softcap, values_BKSH.dtype).out


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
    return _cached(q_BTNH, keys_BKHS, values_BKSH, mask_BTS, softcap, wide(q_BTNH.dtype))


def choose(asked: str, q_BTNH: Float[Array, "b t n h"], aligned: bool, **needs: bool) -> str:
    """The implementation of a call: see `ops.choice`, whose `needs` are `softcap`, `sinks` and `merged`."""
    _, t, _, h = q_BTNH.shape
    return choice.attention(asked, choice.Attention(platform(), q_BTNH.dtype, t, h, aligned, **needs))


def visible(q: Places, k: Places, window: int = 0, beyond: int = 0) -> Bool[Array, "b t s"]:
    """Which keys each query sees: those fewer than `window` tokens back (0: all), and `beyond` or more."""
    same_document = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    seen = same_document & (q.positions[:, :, None] >= k.positions[:, None, :])
    if window or beyond:
        distance = q.positions[:, :, None] - k.positions[:, None, :]
        seen = seen & (distance < window) if window else seen
        seen = seen & (distance >= beyond) if beyond else seen
    return seen


def _mixed(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_places: Places,
    k_places: Places,
    impl: str,
    aligned: bool,
    window: int,
    softcap: float,
    dtype: DTypeLike,
) -> Mixed:
    """The kernels that know every option; `out` in `dtype`."""
    if impl == "blockwise":
        return folded(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, Form(window, softcap, jnp.dtype(dtype)))
    q_BTKGH, width = _grouped(q_BTNH, k_BSKH.shape[2]), wide(q_BTNH.dtype)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=width)
    scores_BKGTS = _capped(scores_BKGTS * q_BTNH.shape[-1] ** -0.5, softcap)
    mask_BTS = visible(q_places, k_places, window)
    weights, lse = _softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf))
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=dtype)
    return Mixed(out.reshape(q_BTNH.shape), _tokens_first(lse))


def _cached(
    q_BTNH: Array, keys_BKHS: Array, values_BKSH: Array, mask_BTS: Array, softcap: float, dtype: DTypeLike
) -> Mixed:
    (b, t, n, h), (_, k, _, s) = q_BTNH.shape, keys_BKHS.shape
    q_BKRH = jnp.einsum("btkgh->bkgth", _grouped(q_BTNH, k)).reshape(b, k, -1, h)  # R = G T, all that read one kv head
    scores_BKRS = jnp.matmul(q_BKRH, keys_BKHS, preferred_element_type=wide(q_BTNH.dtype)) * h**-0.5
    scores_BKGTS = _capped(scores_BKRS.reshape(b, k, -1, t, s), softcap)
    weights, lse = _softmax(jnp.where(mask_BTS[:, None, None], scores_BKGTS, -jnp.inf))
    weights_BKRS = weights.astype(values_BKSH.dtype).reshape(b, k, -1, s)
    out_BKRH = jnp.matmul(weights_BKRS, values_BKSH, preferred_element_type=dtype)
    out_BTNH = jnp.einsum("bkgth->btkgh", out_BKRH.reshape(b, k, -1, t, h)).reshape(b, t, n, h)
    return Mixed(out_BTNH, _tokens_first(lse))


def _softmax(scores_BKGTS: Array) -> tuple[Array, Array]:
    """Softmax over the keys, zero where nothing is seen, and the log-sum-exp [B, K, G, T]."""
    top = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    weights = jnp.exp(scores_BKGTS - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, jnp.log(some) + top, -jnp.inf)
    return weights / some, lse[..., 0]


def _capped(scores: Array, softcap: float) -> Array:
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _tokens_first(lse_BKGT: Array) -> Array:
    """[B, T, N]."""
    b, k, g, t = lse_BKGT.shape
    return jnp.moveaxis(lse_BKGT, 3, 1).reshape(b, t, k * g)


def _grouped(q_BTNH: Array, n_kv_heads: int) -> Array:
    b, t, n, h = q_BTNH.shape
    return q_BTNH.reshape(b, t, n_kv_heads, n // n_kv_heads, h)


# Blockwise: queries in blocks, each against the keys from its window's begin up to its own end, which makes causal
# attention half the square and attention within a window a band. Recomputing the probabilities in the backward pass
# keeps memory linear in T (Dao 2023, section 3). Scores s = cap tanh(x / cap) of the products x, probabilities p:
#   ds = p (dp - p . dp + dlse),   dx = ds (1 - (s / cap)^2).
# The G queries of one kv head and one token are neighbours, [B, K, T, G, H]: a block is then one matrix [T G, H].


class Form(NamedTuple):
    """What a blockwise program is made for."""

    window: int
    softcap: float
    dtype: Any
    """Of the output."""
    sees: Literal["window", "before", "all"] = "window"
    """Which keys, the last of which are of the queries' own tokens: none behind its own, and none before its window
    if the tokens of a document follow one another. `all`: they are any keys."""


def folded(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places, form: Form) -> Mixed:
    """`_blockwise`; with a window, rows that need too many blocks are cut into pieces, rows of their own.

    A piece has the keys of its tokens and, before them, those of the window - 1 tokens that its first one sees. Keys
    are those of the tokens, and with a window perhaps of as many before them.
    """
    b, t, halo, given = *q_BTNH.shape[:2], form.window - 1, k_BSKH.shape[1] - q_BTNH.shape[1]
    pieces = -(-t // (_block_size(t, form.window) * MAX_BLOCKS)) if form.window else 1
    mixed: Any
    if pieces == 1:
        mixed = _blockwise(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form)
        return Mixed(*mixed)
    length = -(-t // pieces)

    def cut(x: Array, before: int = halo, given: int = given) -> Array:
        x = jnp.pad(x, [(0, 0), (before - given, pieces * length - t), *[(0, 0)] * (x.ndim - 2)])
        parts = [x[:, i * length : (i + 1) * length + before] for i in range(pieces)]
        return jnp.stack(parts, axis=1).reshape(b * pieces, length + before, *x.shape[2:])

    q_places, k_places = Places(*(cut(x, 0, 0) for x in q_places)), Places(*(cut(x) for x in k_places))
    mixed = _blockwise(cut(q_BTNH, 0, 0), cut(k_BSKH), cut(v_BSKH), q_places, k_places, form)
    return Mixed(*(x.reshape(b, pieces * length, *x.shape[2:])[:, :t] for x in mixed))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blockwise(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places, form: Form
) -> tuple[Array, Array]:
    return blockwise_forward(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, form)[0]


def _block_size(length: int, window: int) -> int:
    least = -(-length // MAX_BLOCKS)
    return max(BLOCK, min(window // 4, least) if window else least)


def _blocks(length: int, keys: int, form: Form) -> list[tuple[slice, slice]]:
    """Rows of each block of queries, and of the keys that it may see."""
    size, before = _block_size(length, form.window), keys - length
    rows = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    ends = [keys if form.sees == "all" else before + row.stop for row in rows]
    banded = form.window and form.sees == "window"
    begins = [max(0, before + row.start - form.window + 1) if banded else 0 for row in rows]
    return [(row, slice(begin, end)) for row, begin, end in zip(rows, begins, ends, strict=True)]


def heads_first(x_BTNH: Array, n_kv_heads: int) -> Array:
    """[B, K, T, G, H]."""
    return jnp.swapaxes(_grouped(x_BTNH, n_kv_heads), 1, 2)


def _block_scores(
    q_BKTGH: Array, k_BKSH: Array, q_places: Places, k_places: Places, rows: slice, keys: slice, form: Form
) -> tuple[Array, Array]:
    """Scaled, capped scores of one block [B, K, T, G, S] in float32 or wider, and the same with what is unseen -inf."""
    mask_BTS = visible(
        Places(q_places.positions[:, rows], q_places.segments[:, rows]),
        Places(k_places.positions[:, keys], k_places.segments[:, keys]),
        form.window,
    )
    scores = jnp.einsum("bktgh,bksh->bktgs", q_BKTGH, k_BKSH, preferred_element_type=wide(k_BKSH.dtype))
    scores = _capped(scores * q_BKTGH.shape[-1] ** -0.5, form.softcap)
    return scores, jnp.where(mask_BTS[:, None, :, None], scores, -jnp.inf)


def blockwise_forward(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, q_places: Places, k_places: Places, form: Form
) -> tuple[tuple[Array, Array], tuple]:
    n_kv_heads, width = k_BSKH.shape[2], wide(q_BTNH.dtype)
    q = heads_first(q_BTNH, n_kv_heads)
    k, v = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    outs, logs = [], []
    for rows, keys in _blocks(q.shape[2], k.shape[2], form):
        _, scores = _block_scores(q[:, :, rows], k[:, :, keys], q_places, k_places, rows, keys, form)
        top = jnp.max(scores, axis=-1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = jnp.einsum("bktgs,bksh->bktgh", weights.astype(v.dtype), v[:, :, keys], preferred_element_type=width)
        outs.append((mixed / jnp.where(total > 0, total, 1)).astype(form.dtype))
        logs.append(jnp.log(total) + top)
    out_BKTGH, log_BKTG1 = jnp.concatenate(outs, axis=2), jnp.concatenate(logs, axis=2)
    out_BTNH = jnp.swapaxes(out_BKTGH, 1, 2).reshape(q_BTNH.shape)
    lse_BTN = jnp.swapaxes(log_BKTG1, 1, 2).reshape(q_BTNH.shape[:3])
    return (out_BTNH, lse_BTN), (q, k, v, q_places, k_places, out_BKTGH, log_BKTG1)


def _blockwise_backward(form: Form, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    dtype = residuals[0].dtype
    return *(g.astype(dtype) for g in blockwise_gradients(residuals, cotangents, form, dtype)), None, None


def blockwise_gradients(
    residuals: tuple, cotangents: tuple[Array, Array], form: Form, dq_dtype: DTypeLike
) -> tuple[Array, Array, Array]:
    """Of queries, keys and values: their share of the whole, if output and log-sum-exp are those of more keys.

    Args:
        residuals: of `blockwise_forward`.
        dq_dtype: what the gradient of the queries is made in; those of keys and values are float32 or wider.
    """
    q, k, v, q_places, k_places, out, log = residuals
    dout_BTNH, dlse_BTN = cotangents
    dtype, width, scale = q.dtype, wide(q.dtype), q.shape[-1] ** -0.5
    dout = heads_first(dout_BTNH, k.shape[1])
    # sum_s p_ts dp_ts = out_t . dout_t: the softmax's own term of the score gradient
    inner = jnp.sum(dout.astype(width) * out.astype(width), axis=-1, keepdims=True)
    inner = inner - heads_first(dlse_BTN[..., None], k.shape[1])
    dout = dout.astype(dtype)
    log = jnp.where(jnp.isfinite(log), log, 0)
    # The probabilities are made anew from what was kept, so XLA may make them early, and on a CPU it does: those of all
    # layers before the first is needed. Barriers are dropped there; a term of zero makes them wait for the gradient.
    q = q + 0 * dout
    dqs = []
    dk, dv = jnp.zeros(k.shape, width), jnp.zeros(v.shape, width)
    for rows, keys in _blocks(q.shape[2], k.shape[2], form):
        scores, seen = _block_scores(q[:, :, rows], k[:, :, keys], q_places, k_places, rows, keys, form)
        p = jnp.exp(seen - log[:, :, rows])
        dp = jnp.einsum("bktgh,bksh->bktgs", dout[:, :, rows], v[:, :, keys], preferred_element_type=width)
        ds = p * (dp - inner[:, :, rows]) * scale
        ds = (ds * (1 - (scores / form.softcap) ** 2) if form.softcap else ds).astype(dtype)
        dqs.append(jnp.einsum("bktgs,bksh->bktgh", ds, k[:, :, keys], preferred_element_type=dq_dtype))
        dk = dk.at[:, :, keys].add(jnp.einsum("bktgs,bktgh->bksh", ds, q[:, :, rows], preferred_element_type=width))
        p = p.astype(dtype)
        dv = dv.at[:, :, keys].add(jnp.einsum("bktgs,bktgh->bksh", p, dout[:, :, rows], preferred_element_type=width))
    dq_BTNH = jnp.swapaxes(jnp.concatenate(dqs, axis=2), 1, 2).reshape(dout_BTNH.shape)
    return dq_BTNH, jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)


_blockwise.defvjp(blockwise_forward, _blockwise_backward)


def cudnn(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    q_places: Places,
    k_places: Places,
    window: int,
    aligned: bool,
) -> Float[Array, "b t n h"]:
    """cuDNN's fused kernel. Padding rows come out as zero, as everywhere."""
    mask_B1TS = visible(q_places, k_places, window)[:, None]
    options: Any = {"mask": mask_B1TS, "is_causal": aligned, "implementation": "cudnn"}
    out = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, **options)
    return jnp.where((q_places.segments != 0)[:, :, None, None], out, 0)
