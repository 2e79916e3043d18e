"""Mamba's selective scan (S6).

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

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops import sequence_parallel
from jaxlm.ops.ssm.convolution import starts
from jaxlm.typed_jax import (
    custom_vjp,
    dynamic_index_in_dim,
    dynamic_update_index_in_dim,
    einsum,
    fori_loop,
    pad,
)

Tokens = tuple[Array, ...]
"""u and dt [B, T, F], B and C [B, T, P], and what of the state before reaches a token [B, T]; or of one token."""
Weights = tuple[Array, Array]
"""A [P, F] and D [F]."""
Kept = tuple[Tokens, Weights, Array]
"""What the backward pass needs: the arguments, and the state before each chunk [C, B, P, F]."""
Gradients = tuple[tuple[Array | None, ...], Weights, Array]
"""Of tokens, weights and the state before the first token."""


@custom_vjp()
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
    # A step size of zero makes padding neutral: the decay is exp(0) = 1 and nothing is added, so the state passes
    # through without a mask of its own.
    t, width, real_BT = u_BTF.shape[1], wide(u_BTF.dtype), segments_BT != 0
    dt_BTF = jnp.where(real_BT[..., None], dt_BTF.astype(width), 0)
    keep_BT, h_BPF = carried_decay(segments_BT, state_BPF, a_FP.shape[::-1], width, axis)
    tokens = (u_BTF.astype(width), dt_BTF, b_BTP.astype(width), c_BTP.astype(width), keep_BT)
    weights = (a_FP.T.astype(width), d_F.astype(width))
    if impl == "sequential" or t == 1:
        if axis is not None:
            h_BPF = sequence_parallel.before(
                _scan_tokens(tokens, weights, h_BPF)[1], _whole_decay(tokens, weights), axis
            )
        y_BTF, h_BPF = _scan_tokens(tokens, weights, h_BPF)
    elif impl in ("chunked", "auto"):
        y_BTF, h_BPF = _scan_chunks(_padded(tokens, -t % chunk), weights, h_BPF, chunk, axis)
    else:
        raise ValueError(f"unknown scan implementation {impl!r}")
    return y_BTF[:, :t].astype(u_BTF.dtype), h_BPF


def carried_decay(
    segments_BT: Array, state: Array | None, shape: tuple[int, ...], width: jnp.dtype, axis: str | None
) -> tuple[Array, Array]:
    """What of the state before reaches each token, 1 or 0, and the state before the first, of this device."""
    if state is None:
        return (~starts(segments_BT, axis)).astype(width), jnp.zeros((segments_BT.shape[0], *shape), width)
    return jnp.ones(segments_BT.shape, width), state.astype(width)


def _padded(tokens: Tokens, short: int) -> Tokens:
    """`short` tokens more that change nothing: their step size is zero, and they keep the state."""
    if not short:
        return tokens
    *rest, keep_BT = tokens
    padded = (pad(x, ((0, 0), (0, short), (0, 0))) for x in rest)
    return *padded, pad(keep_BT, ((0, 0), (0, short)), constant_values=1)


def _decay(dt_BF: Array, a_PF: Array, keep_B: Array) -> Array:
    return jnp.exp(dt_BF[:, None] * a_PF) * keep_B[:, None, None]


def _outer(x_BF: Array, b_BP: Array) -> Array:
    return x_BF[:, None] * b_BP[:, :, None]


def _step(h_BPF: Array, token: Tokens, weights: Weights) -> tuple[Array, Array]:
    (u_BF, dt_BF, b_BP, c_BP, keep_B), (a_PF, d_F) = token, weights
    # The state lies as [P, F]: channels are the last axis, so each line of the update is a vector operation over
    # contiguous memory.
    h_BPF = _decay(dt_BF, a_PF, keep_B) * h_BPF + _outer(dt_BF * u_BF, b_BP)
    return h_BPF, jnp.sum(h_BPF * c_BP[:, :, None], axis=1) + d_F * u_BF


def _whole_decay(tokens: Tokens, weights: Weights) -> Array:
    """What of a state before the first token is left after the last one [B, P, F]."""
    # A product of exponentials is the exponential of the sum, so the decay over the whole part costs one exponential;
    # one boundary of documents in it makes it zero.
    (_, dt_BTF, _, _, keep_BT), (a_PF, _) = tokens, weights
    return _decay(jnp.sum(dt_BTF, axis=1), a_PF, jnp.prod(keep_BT, axis=1))


def _scan_tokens(tokens: Tokens, weights: Weights, h_BPF: Array) -> tuple[Array, Array]:
    if tokens[0].shape[1] == 1:
        h_BPF, y_BF = _step(h_BPF, tuple(x[:, 0] for x in tokens), weights)
        return y_BF[:, None], h_BPF
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
    h_BPF, y_TBF = lax.scan(functools.partial(_step, weights=weights), h_BPF, tokens)
    return jnp.moveaxis(y_TBF, 0, 1), h_BPF


# A chunk is unrolled: XLA on a CPU then fuses each token's state, output and gradients into a few loops over [B, P, F]
# that stay in the cache. Chunks are read from and written to arrays [B, T, F] in place, so none is transposed. The
# states of a chunk live only while it is worked on; kept are those before each chunk.


@custom_vjp(3, 4)
def _scan_chunks(tokens: Tokens, weights: Weights, h_BPF: Array, chunk: int, axis: str | None) -> tuple[Array, Array]:
    return _scan_chunks_forward(tokens, weights, h_BPF, chunk, axis)[0]


# Over several devices each pass is made twice. The first time, from zero, all but the last state is unused, and XLA
# drops its computation; the second time, it begins with what the other devices have carried so far.


def _scan_chunks_forward(
    tokens: Tokens, weights: Weights, h_BPF: Array, chunk: int, axis: str | None
) -> tuple[tuple[Array, Array], Kept]:
    if axis is not None:
        (_, end_BPF), _ = _scan_part(tokens, weights, h_BPF, chunk)
        h_BPF = sequence_parallel.before(end_BPF, _whole_decay(tokens, weights), axis)
    return _scan_part(tokens, weights, h_BPF, chunk)


def _scan_chunks_backward(chunk: int, axis: str | None, kept: Kept, cotangents: tuple[Array, Array]) -> Gradients:
    dy_BTF, dlast_BPF = cotangents
    if axis is None:
        return _scan_part_backward(chunk, kept, cotangents)
    tokens, weights, _ = kept
    # The gradient runs the other way: first what this part alone hands to the part before it, then what all later parts
    # hand to this one, then the pass that counts.
    *_, dfirst_BPF = _scan_part_backward(chunk, kept, cotangents)
    dnext_BPF = sequence_parallel.before(dfirst_BPF, _whole_decay(tokens, weights), axis, reverse=True)
    dtokens, dweights, _ = _scan_part_backward(chunk, kept, (dy_BTF, dlast_BPF + dnext_BPF))
    return dtokens, dweights, jnp.zeros_like(dfirst_BPF)


_scan_chunks.defvjp(_scan_chunks_forward, _scan_chunks_backward)


def _take(arrays: tuple[Array, ...], i: Array, chunk: int) -> list[tuple[Array, ...]]:
    """The tokens of chunk i, one by one."""
    cut = [lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in arrays]
    return [tuple(x[:, q] for x in cut) for q in range(chunk)]


def _put(x: Array, tokens: tuple[Array, ...], i: Array) -> Array:
    """Write chunk i of x [B, T, ...]."""
    return lax.dynamic_update_slice_in_dim(x, jnp.stack(tokens, axis=1), i * len(tokens), axis=1)


def _scan_part(tokens: Tokens, weights: Weights, h_BPF: Array, chunk: int) -> tuple[tuple[Array, Array], Kept]:
    def work(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        h_BPF, y_BTF, before_CBPF = carry
        # Kept for the backward pass: the state before each chunk, T / chunk of them, instead of all T.
        before_CBPF = dynamic_update_index_in_dim(before_CBPF, h_BPF, i)
        ys: list[Array] = []
        for token in _take(tokens, i, chunk):
            h_BPF, y_BF = _step(h_BPF, token, weights)
            ys.append(y_BF)
        return h_BPF, _put(y_BTF, tuple(ys), i), before_CBPF

    chunks = tokens[0].shape[1] // chunk
    carry = (h_BPF, jnp.zeros_like(tokens[0]), jnp.zeros((chunks, *h_BPF.shape), h_BPF.dtype))
    h_BPF, y_BTF, before_CBPF = fori_loop(0, chunks, work, carry)
    return (y_BTF, h_BPF), (tokens, weights, before_CBPF)


def _scan_part_backward(chunk: int, kept: Kept, cotangents: tuple[Array, Array]) -> Gradients:
    tokens, (a_PF, d_F), before_CBPF = kept
    dy_BTF, dlast_BPF = cotangents
    chunks = before_CBPF.shape[0]

    def work(k: Array, carry: tuple[Array, Array, Tokens]) -> tuple[Array, Array, Tokens]:
        i = chunks - 1 - k
        dh_BPF, da_PF, written = carry
        h_BPF = dynamic_index_in_dim(before_CBPF, i)
        inside: list[tuple[Tokens, Array, Array, Array]] = []
        # Compute the states of this chunk anew from the one before it. They live until the end of the chunk only.
        for token in _take((*tokens, dy_BTF), i, chunk):
            u_BF, dt_BF, b_BP, _, keep_B, _ = token
            decay_BPF, new_BPF = _decay(dt_BF, a_PF, keep_B), _outer(dt_BF * u_BF, b_BP)
            h_BPF = decay_BPF * h_BPF + new_BPF
            inside.append((token, decay_BPF, new_BPF, h_BPF))
        gradients: list[Tokens] = []
        da_BPF = jnp.zeros_like(dh_BPF)
        # Backwards through h_t = decay_t h_(t-1) + new_t: g is the gradient of h_t, from its output and from h_(t+1).
        # As h_t - new_t = decay_t h_(t-1), the gradient of log decay_t is g (h_t - new_t), with no division.
        for (u_BF, dt_BF, b_BP, c_BP, _, dy_BF), decay_BPF, new_BPF, h_BPF in reversed(inside):
            g_BPF = dh_BPF + _outer(dy_BF, c_BP)
            dh_BPF = decay_BPF * g_BPF
            dlog_BPF = g_BPF * (h_BPF - new_BPF)  # of the decay's logarithm, dt A
            da_BPF = da_BPF + dlog_BPF * dt_BF[:, None]
            dnew_BF = jnp.sum(g_BPF * b_BP[:, :, None], axis=1)  # of dt u
            du_BF = dnew_BF * dt_BF + d_F * dy_BF
            ddt_BF = jnp.sum(dlog_BPF * a_PF, axis=1) + dnew_BF * u_BF
            gradients.append((du_BF, ddt_BF, _over_channels(g_BPF, dt_BF * u_BF), _over_channels(h_BPF, dy_BF)))
        by_array = zip(*reversed(gradients), strict=True)
        written = tuple(_put(x, new, i) for x, new in zip(written, by_array, strict=True))
        return dh_BPF, da_PF + jnp.sum(da_BPF, axis=0), written

    # Gradients of u, dt, B and C are written in place of zeros chunk by chunk, last chunk first. `keep` comes from the
    # segments and has none.
    carry = (dlast_BPF, jnp.zeros_like(a_PF), tuple(jnp.zeros_like(x) for x in tokens[:4]))
    dh_BPF, da_PF, dtokens = fori_loop(0, chunks, work, carry)
    return (*dtokens, None), (da_PF, jnp.sum(dy_BTF * tokens[0], axis=(0, 1))), dh_BPF


def _over_channels(x_BPF: Array, y_BF: Array) -> Array:
    """[B, P]; a product of matrices, because XLA on a CPU does not vectorise a sum over the last axis."""
    return einsum("bpf,bf->bp", x_BPF, y_BF, precision="highest")
