"""Mamba-2's scan (SSD). Packed rows and padding are treated as in `selective_scan`.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk, C chunks.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops import sequence_parallel
from jaxlm.ops.ssm.selective_scan import carried_decay
from jaxlm.typed_jax import checkpoint, einsum, pad


def ssd(
    x_BTNH: Float[Array, "b t n h"],
    dt_BTN: Float[Array, "b t n"],
    a_N: Float[Array, " n"],
    b_BTGP: Float[Array, "b t g p"],
    c_BTGP: Float[Array, "b t g p"],
    d_N: Float[Array, " n"],
    segments_BT: Int[Array, "b t"],
    state_BNHP: Float[Array, "b n h p"] | None = None,
    *,
    chunk: int = 64,
    impl: str = "auto",
    axis: str | None = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b n h p"]]:
    """Mamba-2's scan: the recurrence of `selective_scan` with one A and one dt a head (Dao & Gu 2024, section 5).

    Heads n share the B and C of group `n // (N / G)`. `chunked` computes a chunk as masked attention without softmax
    and carries the state from chunk to chunk (section 6); the backward pass keeps the states between chunks alone.

    Args and returns as `selective_scan`.
    """
    width, real_BT = wide(x_BTNH.dtype), segments_BT != 0
    (b, t, n, h), (g, p) = x_BTNH.shape, b_BTGP.shape[2:]
    x_wide = x_BTNH.astype(width)
    dt_BTN = jnp.where(real_BT[..., None], dt_BTN.astype(width), 0)
    keep_BT, state_BNHP = carried_decay(segments_BT, state_BNHP, (n, h, p), width, axis)
    state = state_BNHP.reshape(b, g, n // g, h, p)
    # dt is folded into the input and A into the logarithm of the decay, so that both ways of computing see h_t =
    # exp(log_t) h_(t-1) + w_t B_t and no other parameters. M heads of a group share B and C.
    w_BTGMH = (x_wide * dt_BTN[..., None]).reshape(b, t, g, n // g, h)
    log_BTGM = (dt_BTN * a_N.astype(width)).reshape(b, t, g, n // g)
    inputs = (w_BTGMH, log_BTGM, b_BTGP.astype(width), c_BTGP.astype(width))
    if impl == "sequential" or t == 1:
        y_BTGMH, state = _ssd_tokens(*inputs, keep_BT, state)
    elif impl in ("chunked", "auto"):
        y_BTGMH, state = _ssd_chunks(*inputs, keep_BT, state, min(chunk, t))
    else:
        raise ValueError(f"unknown scan implementation {impl!r}")
    if axis is not None:
        y_BTGMH, state = _ssd_carried(y_BTGMH, state, log_BTGM, inputs[-1], keep_BT, axis)
    y_BTNH = y_BTGMH.reshape(b, t, n, h) + d_N.astype(width)[:, None] * x_wide
    return y_BTNH.astype(x_BTNH.dtype), state.reshape(b, n, h, p)


def _ssd_carried(
    y_BTGMH: Array, end_BGMHP: Array, log_BTGM: Array, c_BTGP: Array, keep_BT: Array, axis: str
) -> tuple[Array, Array]:
    """Outputs and last state of this device, computed from zero, with what the devices before it have carried here."""

    @checkpoint
    def add(y_BTGMH: Array, since_BTGM: Array, c_BTGP: Array, state_BGMHP: Array) -> Array:
        carried_BTGMH = einsum("btgp,bgmhp->btgmh", c_BTGP, state_BGMHP, precision="highest")
        return y_BTGMH + carried_BTGMH * since_BTGM[..., None]

    # What of an earlier state is left at each token: all decays up to it, and nothing once a document has begun. The
    # recurrence is linear, so adding that to outputs computed from zero is exact.
    kept_BT = jnp.cumprod(keep_BT, axis=1)
    since_BTGM = jnp.exp(jnp.cumsum(log_BTGM, axis=1)) * kept_BT[..., None, None]
    decay_BGM11 = since_BTGM[:, -1, :, :, None, None]
    state_BGMHP = sequence_parallel.before(end_BGMHP, decay_BGM11, axis)
    return add(y_BTGMH, since_BTGM, c_BTGP, state_BGMHP), end_BGMHP + decay_BGM11 * state_BGMHP


def _ssd_tokens(w: Array, log: Array, b: Array, c: Array, keep_BT: Array, state: Array) -> tuple[Array, Array]:
    def step(h_BGMHP: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        w_BGMH, log_BGM, b_BGP, c_BGP, keep_B = token
        # `keep` is 0 at the first token of a document: the state before it is multiplied by zero, forward and backward.
        decay_BGM = jnp.exp(log_BGM) * keep_B[:, None, None]
        h_BGMHP = decay_BGM[..., None, None] * h_BGMHP + w_BGMH[..., None] * b_BGP[:, :, None, None]
        return h_BGMHP, einsum("bgmhp,bgp->bgmh", h_BGMHP, c_BGP, precision="highest")

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (w, log, b, c, keep_BT))
    if w.shape[1] == 1:
        state, y = step(state, tuple(x[0] for x in tokens))
        return y[:, None], state
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1), state


def _chunks(x: Array, chunk: int, short: int) -> Array:
    """[B, T, ...] as [C, Q, B, ...], with `short` tokens of zero behind."""
    x = pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 2)


def _tokens(x: Array) -> Array:
    """[C, Q, B, ...] as [B, C Q, ...]."""
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, *x.shape[3:])


def _ssd_chunks(
    w: Array, log: Array, b: Array, c: Array, keep_BT: Array, state: Array, chunk: int
) -> tuple[Array, Array]:
    t, short = w.shape[1], -w.shape[1] % chunk
    # The documents of a row, numbered from the state that was handed in: a token sees what has its number.
    number_BT = jnp.cumsum(keep_BT == 0, axis=1, dtype=jnp.int32)
    number_BT = pad(number_BT, ((0, 0), (0, short)), mode="edge")
    before_BT = pad(number_BT[:, :-1], ((0, 0), (1, 0)))

    def heads_first(x: Array) -> Array:  # [B, T, G, ..., H] to [C, B, G, ..., Q, H]
        return jnp.moveaxis(_chunks(x, chunk, short), 1, -2)

    # Chunks become the axis of the scan. Tokens of a chunk lie before the head dimension, so that each product below is
    # a plain batched matrix product. The checkpoint keeps the state before each chunk and computes the rest anew.
    inputs = (heads_first(w), jnp.moveaxis(_chunks(log, chunk, short), 1, -1), heads_first(b), heads_first(c))
    numbers = tuple(jnp.moveaxis(_chunks(x, chunk, 0), 1, -1) for x in (number_BT, before_BT))
    state, y = lax.scan(checkpoint(_ssd_chunk), state, (*inputs, *numbers))
    return _tokens(jnp.moveaxis(y, -2, 1))[:, :t], state


def _ssd_chunk(h_BGMHP: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk (Dao & Gu 2024, listing 1): attention inside, the state before it, the state after it."""
    w_BGMQH, log_BGMQ, b_BGQP, c_BGQP, number_BQ, before_BQ = inputs
    q, product = log_BGMQ.shape[-1], functools.partial(einsum, precision="highest")
    # Attention in a chunk: token t sees s <= t of its own document, weighted by the decay between them, exp(sum_t -
    # sum_s). The mask enters as -inf before the exponential: above the diagonal the difference is positive, and a
    # product of inf with 0 would be NaN.
    seen_BQQ = jnp.tril(number_BQ[:, :, None] == number_BQ[:, None, :])
    sum_BGMQ = jnp.cumsum(log_BGMQ, axis=-1)
    between = sum_BGMQ[..., :, None] - sum_BGMQ[..., None, :]
    decay_BGMQQ = jnp.exp(jnp.where(seen_BQQ[:, None, None], between, -jnp.inf))
    scores_BGQQ = product("bgtp,bgsp->bgts", c_BGQP, b_BGQP)
    y_BGMQH = product("bgmts,bgmsh->bgmth", scores_BGQQ[:, :, None] * decay_BGMQQ, w_BGMQH)

    same_BQ = number_BQ == before_BQ[:, :1]  # no document has begun since the state
    since_BGMQ = jnp.where(same_BQ[:, None, None], jnp.exp(sum_BGMQ), 0)
    y_BGMQH += product("bgtp,bgmhp->bgmth", c_BGQP, h_BGMHP) * since_BGMQ[..., None]

    # The state after the chunk is the input of each token times its decay up to the last one, which is the last row of
    # the same matrix: tokens of earlier documents are masked there already.
    until_BGMQ = decay_BGMQQ[..., q - 1, :]
    new_BGMHP = product("bgmsh,bgsp->bgmhp", w_BGMQH * until_BGMQ[..., None], b_BGQP)
    return h_BGMHP * since_BGMQ[..., -1, None, None] + new_BGMHP, y_BGMQH
