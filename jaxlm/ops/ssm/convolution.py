"""The causal convolution before a state-space scan, and where documents begin.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk, C chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.numerics import wide
from jaxlm.ops import sequence_parallel
from jaxlm.typed_jax import custom_vjp, pad, vjp


def starts(segments_BT: Int[Array, "b t"], axis: str | None = None) -> Bool[Array, "b t"]:
    """Where a document begins: a token whose segment is not that of the token before it."""
    before_BT = _preceded(segments_BT, 1, axis)[:, :-1]
    return (segments_BT != 0) & (segments_BT != before_BT)


def _preceded(x_BT: Array, tokens: int, axis: str | None) -> Array:
    """x with the tokens before its first: those of other devices, or zero."""
    if axis is None:
        return pad(x_BT, ((0, 0), (tokens, 0), *((0, 0),) * (x_BT.ndim - 2)))
    return jnp.concatenate([sequence_parallel.halo(x_BT, tokens, axis), x_BT], axis=1)


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
    # The state is the K - 1 tokens before: put in front, every tap of a new token finds what it reads.
    joined_BSF = jnp.concatenate([state_BJF, x_BTF.astype(state_BJF.dtype)], axis=1)
    if x_BTF.shape[1] == 1:
        state = jnp.where((segments_BT != 0)[..., None], joined_BSF[:, 1:], state_BJF)
        return _convolve(joined_BSF, kernel_KF, bias_F).astype(x_BTF.dtype), state
    # Real tokens move to the front, are convolved there, and each goes back to its place.
    real_BS = pad(segments_BT != 0, ((0, 0), (taps - 1, 0)), constant_values=True)
    rank_BS = jnp.cumsum(real_BS, axis=1)
    front_BS = jnp.argsort(~real_BS, axis=1, stable=True)
    joined_BSF = jnp.take_along_axis(joined_BSF, front_BS[..., None], axis=1)
    y_BTF = _convolve(joined_BSF, kernel_KF, bias_F).astype(x_BTF.dtype)
    y_BTF = jnp.take_along_axis(y_BTF, jnp.maximum(rank_BS[:, taps - 1 :, None] - taps, 0), axis=1)
    # The new state is the last K - 1 real tokens, which after the move to the front stand right before the count of
    # real ones.
    last_BJ = rank_BS[:, -1:] - (taps - 1) + jnp.arange(taps - 1)
    return y_BTF, jnp.take_along_axis(joined_BSF, last_BJ[..., None], axis=1)


def _convolve(before_BSF: Array, kernel_KF: Array, bias_F: Array | None, segments_BS: Array | None = None) -> Array:
    """The convolution of all but the first K - 1 tokens; with segments, of tokens of one document."""
    (taps, _), width = kernel_KF.shape, wide(before_BSF.dtype)
    t = before_BSF.shape[1] - taps + 1
    y_BTF = jnp.zeros((), width) if bias_F is None else bias_F.astype(width)
    # K shifted products, not a convolution: K is small, mostly 4, and XLA fuses these into one loop. A tap counts only
    # where the token it reads is of the same document as the token it serves, so nothing crosses a boundary.
    for k in range(taps):
        tap_BTF = before_BSF[:, k : k + t].astype(width) * kernel_KF[k].astype(width)
        if segments_BS is not None:
            tap_BTF = jnp.where((segments_BS[:, k : k + t] == segments_BS[:, taps - 1 :])[..., None], tap_BTF, 0)
        y_BTF = y_BTF + tap_BTF
    return jax.nn.silu(y_BTF)


def _conv_rows(x_BTF: Array, kernel_KF: Array, bias_F: Array | None, segments_BT: Array, axis: str | None) -> Array:
    """The convolution of whole rows."""
    # The tokens before the first come with their segments; zeros have segment 0, which is no document.
    before = kernel_KF.shape[0] - 1
    padded_BSF, segments_BS = _preceded(x_BTF, before, axis), _preceded(segments_BT, before, axis)
    return _convolve(padded_BSF, kernel_KF, bias_F, segments_BS).astype(x_BTF.dtype)


Kept = tuple[Array, Array, Array | None, Array]
"""Input, kernel, bias and segments."""


@custom_vjp(4)
def _conv_packed(x_BTF: Array, kernel_KF: Array, bias_F: Array | None, segments_BT: Array, axis: str | None) -> Array:
    """`_conv_rows`; its backward pass keeps the input alone."""
    return _conv_rows(x_BTF, kernel_KF, bias_F, segments_BT, axis)


def _conv_packed_forward(
    x_BTF: Array, kernel_KF: Array, bias_F: Array | None, segments_BT: Array, axis: str | None
) -> tuple[Array, Kept]:
    return _conv_rows(x_BTF, kernel_KF, bias_F, segments_BT, axis), (x_BTF, kernel_KF, bias_F, segments_BT)


def _conv_packed_backward(axis: str | None, kept: Kept, dy_BTF: Array) -> tuple[Array, Array, Array | None, None]:
    x_BTF, kernel_KF, bias_F, segments_BT = kept
    x_BTF = x_BTF + 0 * dy_BTF  # XLA on a CPU would else take what it has computed forward, and keep it: see attention

    def rows(x_BTF: Array, kernel_KF: Array, bias_F: Array | None) -> Array:
        return _conv_rows(x_BTF, kernel_KF, bias_F, segments_BT, axis)

    _, pull = vjp(rows, x_BTF, kernel_KF, bias_F)
    dx_BTF, dkernel_KF, dbias_F = pull(dy_BTF)
    return dx_BTF, dkernel_KF, dbias_F, None


_conv_packed.defvjp(_conv_packed_forward, _conv_packed_backward)
