"""Selective state spaces: the causal convolution, Mamba's scan (S6) and Mamba-2's (SSD).

Where no state is handed in, rows may be packed: a document begins where the segment is another than one token before,
and nothing crosses that boundary, forward or backward; what is carried is multiplied by zero. With a state a row is one
document that goes on. Padding (segment 0) leaves the state as it is; its outputs are finite and mean nothing. Whatever
the inputs are, states and sums are float32 or wider.

With an `axis`, a row is split over the devices along it (within `jax.shard_map`): the convolution reads the last tokens
of the device before, and a scan begins with the state that the devices before have left. Only ends of their parts, and
states, pass between devices.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk, C chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops import shards


def starts(segments_BT: Int[Array, "b t"], axis: str | None = None) -> Bool[Array, "b t"]:
    """Where a document begins: a token whose segment is not that of the token before it."""
    before_BT = _preceded(segments_BT, 1, axis)[:, :-1]
    return (segments_BT != 0) & (segments_BT != before_BT)


def _preceded(x_BT: Array, tokens: int, axis: str | None) -> Array:
    """x with the tokens before its first: those of other devices, or zero."""
    if axis is None:
        return jnp.pad(x_BT, ((0, 0), (tokens, 0), *((0, 0),) * (x_BT.ndim - 2)))
    return jnp.concatenate([shards.halo(x_BT, tokens, axis), x_BT], axis=1)


def causal_conv(
    x_BTF: Float[Array, "b t f"],
    kernel_KF: Float[Array, "k f"],
    bias_F: Float[Array, " f"] | None,
    segments_BT: Int[Array, "b t"],
    state_BJF: Float[Array, "b j f"] | None = None,
    *,
    axis: str | None = None,
) -> tuple[Float[Array, "b t f"], Float[Array, "b j f"] | None]:
    """Depthwise convolution, `y_t = silu(sum_k kernel_k x_(t-K+1+k) + bias)`: the last tap reads the token itself.

    Args:
        state_BJF: the last K - 1 tokens of each row, zero before its first; padding between them and the new tokens, or
            among these, is skipped. Without it, a tap that would read another document or padding reads zero.

    Returns:
        y in the dtype of x, and the last K - 1 tokens of each row if a state was handed in.
    """
    taps = kernel_KF.shape[0]
    if state_BJF is None:
        return _conv_packed(x_BTF, kernel_KF, bias_F, segments_BT, axis), None
    joined_BSF = jnp.concatenate([state_BJF, x_BTF.astype(state_BJF.dtype)], axis=1)
    if x_BTF.shape[1] == 1:
        state = jnp.where((segments_BT != 0)[..., None], joined_BSF[:, 1:], state_BJF)
        return _convolve(joined_BSF, kernel_KF, bias_F).astype(x_BTF.dtype), state
    # Real tokens move to the front, are convolved there, and each goes back to its place.
    real_BS = jnp.pad(segments_BT != 0, ((0, 0), (taps - 1, 0)), constant_values=True)
    rank_BS = jnp.cumsum(real_BS, axis=1)
    front_BS = jnp.argsort(~real_BS, axis=1, stable=True)
    joined_BSF = jnp.take_along_axis(joined_BSF, front_BS[..., None], axis=1)
    y_BTF = _convolve(joined_BSF, kernel_KF, bias_F).astype(x_BTF.dtype)
    y_BTF = jnp.take_along_axis(y_BTF, jnp.maximum(rank_BS[:, taps - 1 :, None] - taps, 0), axis=1)
    last_BJ = rank_BS[:, -1:] - (taps - 1) + jnp.arange(taps - 1)
    return y_BTF, jnp.take_along_axis(joined_BSF, last_BJ[..., None], axis=1)


def _convolve(before_BSF: Array, kernel_KF: Array, bias_F: Array | None, segments_BS: Array | None = None) -> Array:
    """The convolution of all but the first K - 1 tokens; with segments, of tokens of one document."""
    (taps, _), width = kernel_KF.shape, wide(before_BSF.dtype)
    t = before_BSF.shape[1] - taps + 1
    y_BTF = jnp.zeros((), width) if bias_F is None else bias_F.astype(width)
    for k in range(taps):
        tap_BTF = before_BSF[:, k : k + t].astype(width) * kernel_KF[k].astype(width)
        if segments_BS is not None:
            tap_BTF = jnp.where((segments_BS[:, k : k + t] == segments_BS[:, taps - 1 :])[..., None], tap_BTF, 0)
        y_BTF = y_BTF + tap_BTF
    return jax.nn.silu(y_BTF)


def _conv_rows(x_BTF: Array, kernel_KF: Array, bias_F: Array | None, segments_BT: Array, axis: str | None) -> Array:
    """The convolution of whole rows."""
    before = kernel_KF.shape[0] - 1
    padded_BSF, segments_BS = _preceded(x_BTF, before, axis), _preceded(segments_BT, before, axis)
    return _convolve(padded_BSF, kernel_KF, bias_F, segments_BS).astype(x_BTF.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _conv_packed(x_BTF: Array, kernel_KF: Array, bias_F: Array | None, segments_BT: Array, axis: str | None) -> Array:
    """`_conv_rows`; its backward pass keeps the input alone."""
    return _conv_rows(x_BTF, kernel_KF, bias_F, segments_BT, axis)


def _conv_packed_forward(
    x_BTF: Array, kernel_KF: Array, bias_F: Array | None, segments_BT: Array, axis: str | None
) -> tuple:
    return _conv_rows(x_BTF, kernel_KF, bias_F, segments_BT, axis), (x_BTF, kernel_KF, bias_F, segments_BT)


def _conv_packed_backward(axis: str | None, inputs: tuple, dy_BTF: Array) -> tuple:
    x_BTF, kernel_KF, bias_F, segments_BT = inputs
    x_BTF = x_BTF + 0 * dy_BTF  # XLA on a CPU would else take what it has computed forward, and keep it: see attention
    _, pull = jax.vjp(lambda x, kernel, bias: _conv_rows(x, kernel, bias, segments_BT, axis), x_BTF, kernel_KF, bias_F)
    return *pull(dy_BTF), None


_conv_packed.defvjp(_conv_packed_forward, _conv_packed_backward)


@jax.custom_vjp
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 + exp(x)). The backward pass keeps the result alone: the derivative is 1 - exp(-y)."""
    return jax.nn.softplus(x)


def _softplus_forward(x: Array) -> tuple[Array, Array]:
    y = softplus(x)
    return y, y


def _softplus_backward(y: Array, dy: Array) -> tuple[Array]:
    return (-dy * jnp.expm1(-y),)


softplus.defvjp(_softplus_forward, _softplus_backward)


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
    axis: str | None = None,
) -> tuple[Float[Array, "b t f"], Float[Array, "b p f"]]:
    """Mamba's scan: `h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t`, `y_t = C_t h_t + D u_t` (Gu & Dao 2023, algorithm 2).

    A is discretised by the zero-order hold of equation 4 and B by Euler's rule, as the paper's code does it.

    Args:
        dt_BTF: step sizes, positive; A is negative.
        state_BPF: of the call before.
        chunk: `chunked` keeps the state before every `chunk` tokens for the backward pass and computes the others anew.
        impl: `sequential`, the recurrence token by token; `chunked`; or `auto`.

    Returns:
        y in the dtype of u, and the state after the last token, with an axis after the last one of this device.
    """
    t, width, real_BT = u_BTF.shape[1], wide(u_BTF.dtype), segments_BT != 0
    dt_BTF = jnp.where(real_BT[..., None], dt_BTF.astype(width), 0)
    keep_BT, h_BPF = _carried(segments_BT, state_BPF, a_FP.shape[::-1], width, axis)
    tokens = (u_BTF.astype(width), dt_BTF, b_BTP.astype(width), c_BTP.astype(width), keep_BT)
    weights = (a_FP.T.astype(width), d_F.astype(width))
    if impl == "sequential" or t == 1:
        if axis is not None:
            h_BPF = shards.before(_scan_tokens(tokens, weights, h_BPF)[1], _whole_decay(tokens, weights), axis)
        y_BTF, h_BPF = _scan_tokens(tokens, weights, h_BPF)
    elif impl in ("chunked", "auto"):
        scanned: Any = _scan_chunks(_padded(tokens, -t % chunk), weights, h_BPF, chunk, axis)
        y_BTF, h_BPF = scanned
    else:
        raise ValueError(f"unknown scan implementation {impl!r}")
    return y_BTF[:, :t].astype(u_BTF.dtype), h_BPF


def _carried(
    segments_BT: Array, state: Array | None, shape: tuple[int, ...], width: jnp.dtype, axis: str | None
) -> tuple[Array, Array]:
    """What of the state before reaches each token, 1 or 0, and the state before the first, of this device."""
    if state is None:
        return (~starts(segments_BT, axis)).astype(width), jnp.zeros((segments_BT.shape[0], *shape), width)
    return jnp.ones(segments_BT.shape, width), state.astype(width)


def _padded(tokens: tuple[Array, ...], short: int) -> tuple[Array, ...]:
    """`short` tokens more that change nothing: their step size is zero, and they keep the state."""
    if not short:
        return tokens
    *rest, keep_BT = tokens
    padded = (jnp.pad(x, ((0, 0), (0, short), (0, 0))) for x in rest)
    return *padded, jnp.pad(keep_BT, ((0, 0), (0, short)), constant_values=1)


def _decay(dt_BF: Array, a_PF: Array, keep_B: Array) -> Array:
    return jnp.exp(dt_BF[:, None] * a_PF) * keep_B[:, None, None]


def _outer(x_BF: Array, b_BP: Array) -> Array:
    return x_BF[:, None] * b_BP[:, :, None]


def _step(h_BPF: Array, token: tuple[Array, ...], weights: tuple[Array, Array]) -> tuple[Array, Array]:
    (u_BF, dt_BF, b_BP, c_BP, keep_B), (a_PF, d_F) = token, weights
    h_BPF = _decay(dt_BF, a_PF, keep_B) * h_BPF + _outer(dt_BF * u_BF, b_BP)
    return h_BPF, jnp.sum(h_BPF * c_BP[:, :, None], axis=1) + d_F * u_BF


def _whole_decay(tokens: tuple[Array, ...], weights: tuple[Array, Array]) -> Array:
    """What of a state before the first token is left after the last one [B, P, F]."""
    (_, dt_BTF, _, _, keep_BT), (a_PF, _) = tokens, weights
    return _decay(jnp.sum(dt_BTF, axis=1), a_PF, jnp.prod(keep_BT, axis=1))


def _scan_tokens(tokens: tuple[Array, ...], weights: tuple[Array, Array], h_BPF: Array) -> tuple[Array, Array]:
    if tokens[0].shape[1] == 1:
        h_BPF, y_BF = _step(h_BPF, tuple(x[:, 0] for x in tokens), weights)
        return y_BF[:, None], h_BPF
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
    h_BPF, y_TBF = lax.scan(lambda h, token: _step(h, token, weights), h_BPF, tokens)
    return jnp.moveaxis(y_TBF, 0, 1), h_BPF


# A chunk is unrolled: XLA on a CPU then fuses each token's state, output and gradients into a few loops over [B, P, F]
# that stay in the cache. Chunks are read from and written to arrays [B, T, F] in place, so none is transposed. The
# states of a chunk live only while it is worked on; kept are those before each chunk.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _scan_chunks(
    tokens: tuple[Array, ...], weights: tuple[Array, Array], h_BPF: Array, chunk: int, axis: str | None
) -> tuple[Array, Array]:
    return _scan_chunks_forward(tokens, weights, h_BPF, chunk, axis)[0]


# Over several devices each pass is made twice. The first time, from zero, all but the last state is unused, and XLA
# drops its computation; the second time, it begins with what the other devices have carried so far.


def _scan_chunks_forward(
    tokens: tuple[Array, ...], weights: tuple[Array, Array], h_BPF: Array, chunk: int, axis: str | None
) -> tuple[tuple[Array, Array], tuple]:
    if axis is not None:
        (_, end_BPF), _ = _scan_part(tokens, weights, h_BPF, chunk)
        h_BPF = shards.before(end_BPF, _whole_decay(tokens, weights), axis)
    return _scan_part(tokens, weights, h_BPF, chunk)


def _scan_chunks_backward(chunk: int, axis: str | None, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    dy_BTF, dlast_BPF = cotangents
    if axis is None:
        return _scan_part_backward(chunk, residuals, cotangents)
    tokens, weights, _ = residuals
    *_, dfirst_BPF = _scan_part_backward(chunk, residuals, cotangents)
    dnext_BPF = shards.before(dfirst_BPF, _whole_decay(tokens, weights), axis, reverse=True)
    dtokens, dweights, _ = _scan_part_backward(chunk, residuals, (dy_BTF, dlast_BPF + dnext_BPF))
    return dtokens, dweights, jnp.zeros_like(dfirst_BPF)


_scan_chunks.defvjp(_scan_chunks_forward, _scan_chunks_backward)


def _take(arrays: tuple[Array, ...], i: Array, chunk: int) -> list[tuple[Array, ...]]:
    """The tokens of chunk i, one by one."""
    cut = [lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in arrays]
    return [tuple(x[:, q] for x in cut) for q in range(chunk)]


def _put(x: Array, tokens: tuple[Array, ...], i: Array) -> Array:
    """Write chunk i of x [B, T, ...]."""
    return lax.dynamic_update_slice_in_dim(x, jnp.stack(tokens, axis=1), i * len(tokens), axis=1)


def _scan_part(
    tokens: tuple[Array, ...], weights: tuple[Array, Array], h_BPF: Array, chunk: int
) -> tuple[tuple[Array, Array], tuple]:
    def work(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        h_BPF, y_BTF, before_CBPF = carry
        before_CBPF = lax.dynamic_update_index_in_dim(before_CBPF, h_BPF, i, axis=0)
        ys = []
        for token in _take(tokens, i, chunk):
            h_BPF, y_BF = _step(h_BPF, token, weights)
            ys.append(y_BF)
        return h_BPF, _put(y_BTF, tuple(ys), i), before_CBPF

    chunks = tokens[0].shape[1] // chunk
    carry = (h_BPF, jnp.zeros_like(tokens[0]), jnp.zeros((chunks, *h_BPF.shape), h_BPF.dtype))
    h_BPF, y_BTF, before_CBPF = lax.fori_loop(0, chunks, work, carry)
    return (y_BTF, h_BPF), (tokens, weights, before_CBPF)


def _scan_part_backward(chunk: int, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    tokens, (a_PF, d_F), before_CBPF = residuals
    dy_BTF, dlast_BPF = cotangents
    chunks = before_CBPF.shape[0]

    def work(k: Array, carry: tuple) -> tuple:
        i = chunks - 1 - k
        dh_BPF, da_PF, written = carry
        h_BPF = lax.dynamic_index_in_dim(before_CBPF, i, axis=0, keepdims=False)
        inside = []
        for token in _take((*tokens, dy_BTF), i, chunk):
            u_BF, dt_BF, b_BP, _, keep_B, _ = token
            decay_BPF, new_BPF = _decay(dt_BF, a_PF, keep_B), _outer(dt_BF * u_BF, b_BP)
            h_BPF = decay_BPF * h_BPF + new_BPF
            inside.append((token, decay_BPF, new_BPF, h_BPF))
        gradients, da_BPF = [], jnp.zeros_like(dh_BPF)
        for (u_BF, dt_BF, b_BP, c_BP, _, dy_BF), decay_BPF, new_BPF, h_BPF in reversed(inside):
            g_BPF = dh_BPF + _outer(dy_BF, c_BP)
            dh_BPF = decay_BPF * g_BPF
            dlog_BPF = g_BPF * (h_BPF - new_BPF)  # of the decay's logarithm, dt A
            da_BPF = da_BPF + dlog_BPF * dt_BF[:, None]
            dnew_BF = jnp.sum(g_BPF * b_BP[:, :, None], axis=1)  # of dt u
            du_BF = dnew_BF * dt_BF + d_F * dy_BF
            ddt_BF = jnp.sum(dlog_BPF * a_PF, axis=1) + dnew_BF * u_BF
            gradients.append((du_BF, ddt_BF, _over_channels(g_BPF, dt_BF * u_BF), _over_channels(h_BPF, dy_BF)))
        gradients = zip(*reversed(gradients), strict=True)
        written = tuple(_put(x, new, i) for x, new in zip(written, gradients, strict=True))
        return dh_BPF, da_PF + jnp.sum(da_BPF, axis=0), written

    carry = (dlast_BPF, jnp.zeros_like(a_PF), tuple(jnp.zeros_like(x) for x in tokens[:4]))
    dh_BPF, da_PF, dtokens = lax.fori_loop(0, chunks, work, carry)
    return (*dtokens, None), (da_PF, jnp.sum(dy_BTF * tokens[0], axis=(0, 1))), dh_BPF


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
    keep_BT, state_BNHP = _carried(segments_BT, state_BNHP, (n, h, p), width, axis)
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
    if axis is not None:
        y_BTGMH, state = _ssd_carried(y_BTGMH, state, log_BTGM, inputs[-1], keep_BT, axis)
    y_BTNH = y_BTGMH.reshape(b, t, n, h) + d_N.astype(width)[:, None] * x_wide
    return y_BTNH.astype(x_BTNH.dtype), state.reshape(b, n, h, p)


def _ssd_carried(
    y_BTGMH: Array, end_BGMHP: Array, log_BTGM: Array, c_BTGP: Array, keep_BT: Array, axis: str
) -> tuple[Array, Array]:
    """Outputs and last state of this device, computed from zero, with what the devices before it have carried here."""

    @jax.checkpoint
    def add(y_BTGMH: Array, since_BTGM: Array, c_BTGP: Array, state_BGMHP: Array) -> Array:
        carried_BTGMH = jnp.einsum("btgp,bgmhp->btgmh", c_BTGP, state_BGMHP, precision="highest")
        return y_BTGMH + carried_BTGMH * since_BTGM[..., None]

    kept_BT = jnp.cumprod(keep_BT, axis=1)
    since_BTGM = jnp.exp(jnp.cumsum(log_BTGM, axis=1)) * kept_BT[..., None, None]
    decay_BGM11 = since_BTGM[:, -1, :, :, None, None]
    state_BGMHP = shards.before(end_BGMHP, decay_BGM11, axis)
    return add(y_BTGMH, since_BTGM, c_BTGP, state_BGMHP), end_BGMHP + decay_BGM11 * state_BGMHP


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


def _chunks(x: Array, chunk: int, short: int) -> Array:
    """[B, T, ...] as [C, Q, B, ...], with `short` tokens of zero behind."""
    x = jnp.pad(x, ((0, 0), (0, short), *((0, 0),) * (x.ndim - 2)))
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
