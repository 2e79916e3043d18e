"""Selective state spaces: the causal convolution, Mamba's scan (S6) and Mamba-2's (SSD).

Where no state is handed in, rows may be packed: a document begins where the segment is another than one token before,
and nothing crosses that boundary, forward or backward; what is carried is multiplied by zero. With a state a row is one
document that goes on. Padding (segment 0) leaves the state as it is; its outputs are finite and mean nothing. Whatever
the inputs are, states and sums are float32 or wider.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk, C chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.numerics import wide


def starts(segments_BT: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """Where a document begins: a token whose segment is not that of the token before it."""
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)))
    return (segments_BT != 0) & (segments_BT != before_BT)


def causal_conv(
    x_BTF: Float[Array, "b t f"],
    kernel_KF: Float[Array, "k f"],
    bias_F: Float[Array, " f"] | None,
    segments_BT: Int[Array, "b t"],
    state_BJF: Float[Array, "b j f"] | None = None,
) -> tuple[Float[Array, "b t f"], Float[Array, "b j f"] | None]:
    """Depthwise convolution, `y_t = sum_k kernel_k x_(t-K+1+k) + bias`: the last tap reads the token itself.

    Args:
        state_BJF: the last K - 1 tokens of each row, zero before its first; padding between them and the new tokens, or
            among these, is skipped. Without it, a tap that would read another document or padding reads zero.

    Returns:
        y in the dtype of x, and the last K - 1 tokens of each row if a state was handed in.
    """
    taps, width = kernel_KF.shape[0], wide(x_BTF.dtype)
    kernel_KF = kernel_KF.astype(width)
    bias_F = None if bias_F is None else bias_F.astype(width)

    def convolve(padded_BSF: Array, keep: list[Array | None]) -> Array:
        t = padded_BSF.shape[1] - taps + 1
        y_BTF = jnp.zeros((), width) if bias_F is None else bias_F
        for k in range(taps):
            tap_BTF = padded_BSF[:, k : k + t].astype(width) * kernel_KF[k]
            seen_BT = keep[k]
            y_BTF = y_BTF + (tap_BTF if seen_BT is None else jnp.where(seen_BT[..., None], tap_BTF, 0))
        return y_BTF.astype(x_BTF.dtype)

    if state_BJF is None:
        padded_BSF = jnp.pad(x_BTF, ((0, 0), (taps - 1, 0), (0, 0)))
        segments_BS = jnp.pad(segments_BT, ((0, 0), (taps - 1, 0)))
        t = segments_BT.shape[1]
        return convolve(padded_BSF, [segments_BS[:, k : k + t] == segments_BT for k in range(taps)]), None

    joined_BSF = jnp.concatenate([state_BJF, x_BTF.astype(state_BJF.dtype)], axis=1)
    nothing: list[Array | None] = [None] * taps
    if x_BTF.shape[1] == 1:
        state = jnp.where((segments_BT != 0)[..., None], joined_BSF[:, 1:], state_BJF)
        return convolve(joined_BSF, nothing), state
    # Real tokens move to the front, are convolved there, and each goes back to its place.
    real_BS = jnp.pad(segments_BT != 0, ((0, 0), (taps - 1, 0)), constant_values=True)
    rank_BS = jnp.cumsum(real_BS, axis=1)
    front_BS = jnp.argsort(~real_BS, axis=1, stable=True)
    joined_BSF = jnp.take_along_axis(joined_BSF, front_BS[..., None], axis=1)
    y_BTF = convolve(joined_BSF, nothing)
    y_BTF = jnp.take_along_axis(y_BTF, jnp.maximum(rank_BS[:, taps - 1 :, None] - taps, 0), axis=1)
    last_BJ = rank_BS[:, -1:] - (taps - 1) + jnp.arange(taps - 1)
    return y_BTF, jnp.take_along_axis(joined_BSF, last_BJ[..., None], axis=1)


def selective_scan(
    u_BTF: Float[Array, "b t f"],
    dt_BTF: Float[Array, "b t f"],
    a_FP: Float[Array, "f p"],
    b_BTP: Float[Array, "b t p"],
    c_BTP: Float[Array, "b t p"],
    d_F: Float[Array, " f"],
    segments_BT: Int[Array, "b t"],
    state_BPF: Float[Array, "b p f"] | None = None,
    *,
    chunk: int = 8,
    impl: str = "auto",
) -> tuple[Float[Array, "b t f"], Float[Array, "b p f"]]:
    """Mamba's scan: `h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t`, `y_t = C_t h_t + D u_t` (Gu & Dao 2023, algorithm 2).

    A is discretised by the zero-order hold of equation 4 and B by Euler's rule, as the paper's code does it.

    Args:
        dt_BTF: step sizes, positive; A is negative.
        state_BPF: of the call before.
        chunk: `chunked` keeps the state before every `chunk` tokens for the backward pass and computes the others anew.
        impl: `sequential`, the recurrence token by token; `chunked`; or `auto`.

    Returns:
        y in the dtype of u, and the state after the last token.
    """
    width, real_BT = wide(u_BTF.dtype), segments_BT != 0
    u_wide = u_BTF.astype(width)
    dt_BTF = jnp.where(real_BT[..., None], dt_BTF.astype(width), 0)
    keep_BT, h_BPF = _carried(segments_BT, state_BPF, a_FP.shape[::-1], width)
    inputs = (dt_BTF, dt_BTF * u_wide, a_FP.T.astype(width), b_BTP.astype(width), c_BTP.astype(width))
    if impl == "sequential" or u_BTF.shape[1] == 1:
        y_BTF, h_BPF = _scan_tokens(*inputs, keep_BT, h_BPF)
    elif impl in ("chunked", "auto"):
        short = -u_BTF.shape[1] % chunk  # a step size of zero changes nothing
        dt, w, a, b, c = (_chunks(x, chunk, short) if x.ndim == 3 else x for x in inputs)
        keep_CQB = _chunks(jnp.pad(keep_BT, ((0, 0), (0, short)), constant_values=1), chunk, 0)
        y_CQBF, h_BPF = _scan_chunks(dt, w, a, b, c, keep_CQB, h_BPF)
        y_BTF = _tokens(y_CQBF)[:, : u_BTF.shape[1]]
    else:
        raise ValueError(f"unknown scan implementation {impl!r}")
    return (y_BTF + d_F.astype(width) * u_wide).astype(u_BTF.dtype), h_BPF


def _carried(segments_BT: Array, state: Array | None, shape: tuple[int, ...], width: jnp.dtype) -> tuple[Array, Array]:
    """What of the state before reaches each token, 1 or 0, and the state before the first."""
    if state is None:
        return (~starts(segments_BT)).astype(width), jnp.zeros((segments_BT.shape[0], *shape), width)
    return jnp.ones(segments_BT.shape, width), state.astype(width)


def _chunks(x: Array, chunk: int, short: int) -> Array:
    """[B, T, ...] as [C, Q, B, ...], with `short` tokens of zero behind."""
    x = jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 2)


def _tokens(x: Array) -> Array:
    """[C, Q, B, ...] as [B, C Q, ...]."""
    return jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, *x.shape[3:])


def _decay(dt_BF: Array, a_PF: Array, keep_B: Array) -> Array:
    return jnp.exp(dt_BF[:, None] * a_PF) * keep_B[:, None, None]


def _outer(x_BF: Array, b_BP: Array) -> Array:
    return x_BF[:, None] * b_BP[:, :, None]


def _step(h_BPF: Array, token: tuple[Array, ...], a_PF: Array) -> tuple[Array, Array]:
    dt_BF, w_BF, b_BP, c_BP, keep_B = token
    h_BPF = _decay(dt_BF, a_PF, keep_B) * h_BPF + _outer(w_BF, b_BP)
    return h_BPF, jnp.sum(h_BPF * c_BP[:, :, None], axis=1)


def _scan_tokens(
    dt_BTF: Array, w_BTF: Array, a_PF: Array, b_BTP: Array, c_BTP: Array, keep_BT: Array, h_BPF: Array
) -> tuple[Array, Array]:
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (dt_BTF, w_BTF, b_BTP, c_BTP, keep_BT))
    if dt_BTF.shape[1] == 1:
        h_BPF, y_BF = _step(h_BPF, tuple(x[0] for x in tokens), a_PF)
        return y_BF[:, None], h_BPF
    h_BPF, y_TBF = lax.scan(lambda h, token: _step(h, token, a_PF), h_BPF, tokens)
    return jnp.moveaxis(y_TBF, 0, 1), h_BPF


# A chunk is unrolled: XLA on a CPU then fuses each token's state, output and gradients into a few loops over [B, P, F]
# that stay in the cache. The states of a chunk live only while it is worked on.


@jax.custom_vjp
def _scan_chunks(
    dt_CQBF: Array, w_CQBF: Array, a_PF: Array, b_CQBP: Array, c_CQBP: Array, keep_CQB: Array, h_BPF: Array
) -> tuple[Array, Array]:
    return _scan_chunks_forward(dt_CQBF, w_CQBF, a_PF, b_CQBP, c_CQBP, keep_CQB, h_BPF)[0]


def _scan_chunks_forward(
    dt: Array, w: Array, a_PF: Array, b: Array, c: Array, keep: Array, h_BPF: Array
) -> tuple[tuple[Array, Array], tuple]:
    def chunk(h_BPF: Array, tokens: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        first_BPF, ys = h_BPF, []
        for token in zip(*tokens, strict=True):
            h_BPF, y_BF = _step(h_BPF, token, a_PF)
            ys.append(y_BF)
        return h_BPF, (jnp.stack(ys), first_BPF)

    tokens = (dt, w, b, c, keep)
    h_BPF, (y_CQBF, first_CBPF) = lax.scan(chunk, h_BPF, tokens)
    return (y_CQBF, h_BPF), (tokens, a_PF, first_CBPF)


def _scan_chunks_backward(residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    tokens, a_PF, first_CBPF = residuals
    dy_CQBF, dlast_BPF = cotangents

    def chunk(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        (dh_BPF, da_PF), ((dt, w, b, c, keep), h_BPF, dy) = carry, inputs
        decays, states = [], []
        for q in range(dt.shape[0]):
            decays.append(_decay(dt[q], a_PF, keep[q]))
            h_BPF = decays[q] * h_BPF + _outer(w[q], b[q])
            states.append(h_BPF)
        gradients, da_BPF = [], jnp.zeros_like(dh_BPF)
        for q in reversed(range(dt.shape[0])):
            g_BPF = dh_BPF + _outer(dy[q], c[q])
            dh_BPF = decays[q] * g_BPF
            dlog_BPF = g_BPF * (states[q] - _outer(w[q], b[q]))  # of the decay's logarithm, dt A
            da_BPF = da_BPF + dlog_BPF * dt[q][:, None]
            ddt_BF = jnp.sum(dlog_BPF * a_PF, axis=1)
            dw_BF = jnp.sum(g_BPF * b[q][:, :, None], axis=1)
            gradients.append((ddt_BF, dw_BF, _over_channels(g_BPF, w[q]), _over_channels(states[q], dy[q])))
        gradients = tuple(jnp.stack(gradient) for gradient in zip(*gradients[::-1], strict=True))
        return (dh_BPF, da_PF + jnp.sum(da_BPF, axis=0)), gradients

    carry = (dlast_BPF, jnp.zeros_like(a_PF))
    (dh_BPF, da_PF), (ddt, dw, db, dc) = lax.scan(chunk, carry, (tokens, first_CBPF, dy_CQBF), reverse=True)
    return ddt, dw, da_PF, db, dc, None, dh_BPF


_scan_chunks.defvjp(_scan_chunks_forward, _scan_chunks_backward)


def _over_channels(x_BPF: Array, y_BF: Array) -> Array:
    """[B, P]; a product of matrices, because XLA on a CPU does not vectorise a sum over the last axis."""
    return jnp.einsum("bpf,bf->bp", x_BPF, y_BF, precision="highest")


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
    keep_BT, state_BNHP = _carried(segments_BT, state_BNHP, (n, h, p), width)
    state = state_BNHP.reshape(b, g, n // g, h, p)
    w_BTGMH = (x_wide * dt_BTN[..., None]).reshape(b, t, g, n // g, h)
    log_BTGM = (dt_BTN * a_N.astype(width)).reshape(b, t, g, n // g)
    inputs = (w_BTGMH, log_BTGM, b_BTGP.astype(width), c_BTGP.astype(width))
    if impl == "sequential" or t == 1:
        y_BTGMH, state = _ssd_tokens(*inputs, keep_BT, state)
    elif impl in ("chunked", "auto"):
        y_BTGMH, state = _ssd_chunks(*inputs, keep_BT, state, min(chunk, t))
    else:
        raise ValueError(f"unknown scan implementation {impl!r}")
    y_BTNH = y_BTGMH.reshape(b, t, n, h) + d_N.astype(width)[:, None] * x_wide
    return y_BTNH.astype(x_BTNH.dtype), state.reshape(b, n, h, p)


def _ssd_tokens(w: Array, log: Array, b: Array, c: Array, keep_BT: Array, state: Array) -> tuple[Array, Array]:
    def step(h_BGMHP: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        w_BGMH, log_BGM, b_BGP, c_BGP, keep_B = token
        decay_BGM = jnp.exp(log_BGM) * keep_B[:, None, None]
        h_BGMHP = decay_BGM[..., None, None] * h_BGMHP + w_BGMH[..., None] * b_BGP[:, :, None, None]
        return h_BGMHP, jnp.einsum("bgmhp,bgp->bgmh", h_BGMHP, c_BGP, precision="highest")

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (w, log, b, c, keep_BT))
    if w.shape[1] == 1:
        state, y = step(state, tuple(x[0] for x in tokens))
        return y[:, None], state
    state, y = lax.scan(step, state, tokens)
    return jnp.moveaxis(y, 0, 1), state


def _ssd_chunks(
    w: Array, log: Array, b: Array, c: Array, keep_BT: Array, state: Array, chunk: int
) -> tuple[Array, Array]:
    t, short = w.shape[1], -w.shape[1] % chunk
    # The documents of a row, numbered from the state that was handed in: a token sees what has its number.
    number_BT = jnp.cumsum(keep_BT == 0, axis=1, dtype=jnp.int32)
    number_BT = jnp.pad(number_BT, ((0, 0), (0, short)), mode="edge")
    before_BT = jnp.pad(number_BT[:, :-1], ((0, 0), (1, 0)))

    def heads_first(x: Array) -> Array:  # [B, T, G, ..., H] to [C, B, G, ..., Q, H]
        return jnp.moveaxis(_chunks(x, chunk, short), 1, -2)

    inputs = (heads_first(w), jnp.moveaxis(_chunks(log, chunk, short), 1, -1), heads_first(b), heads_first(c))
    numbers = tuple(jnp.moveaxis(_chunks(x, chunk, 0), 1, -1) for x in (number_BT, before_BT))
    state, y = lax.scan(jax.checkpoint(_ssd_chunk), state, (*inputs, *numbers))
    return _tokens(jnp.moveaxis(y, -2, 1))[:, :t], state


def _ssd_chunk(h_BGMHP: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk (Dao & Gu 2024, listing 1): attention inside, the state before it, the state after it."""
    w_BGMQH, log_BGMQ, b_BGQP, c_BGQP, number_BQ, before_BQ = inputs
    q, einsum = log_BGMQ.shape[-1], lambda *args: jnp.einsum(*args, precision="highest")
    seen_BQQ = jnp.tril(number_BQ[:, :, None] == number_BQ[:, None, :])
    sum_BGMQ = jnp.cumsum(log_BGMQ, axis=-1)
    between = sum_BGMQ[..., :, None] - sum_BGMQ[..., None, :]
    decay_BGMQQ = jnp.exp(jnp.where(seen_BQQ[:, None, None], between, -jnp.inf))
    scores_BGQQ = einsum("bgtp,bgsp->bgts", c_BGQP, b_BGQP)
    y_BGMQH = einsum("bgmts,bgmsh->bgmth", scores_BGQQ[:, :, None] * decay_BGMQQ, w_BGMQH)

    same_BQ = number_BQ == before_BQ[:, :1]  # no document has begun since the state
    since_BGMQ = jnp.where(same_BQ[:, None, None], jnp.exp(sum_BGMQ), 0)
    y_BGMQH += einsum("bgtp,bgmhp->bgmth", c_BGQP, h_BGMHP) * since_BGMQ[..., None]

    until_BGMQ = decay_BGMQQ[..., q - 1, :]
    new_BGMHP = einsum("bgmsh,bgsp->bgmhp", w_BGMQH * until_BGMQ[..., None], b_BGQP)
    return h_BGMHP * since_BGMQ[..., -1, None, None] + new_BGMHP, y_BGMQH
