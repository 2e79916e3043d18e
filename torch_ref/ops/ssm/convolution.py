"""The causal convolution before a state-space scan, and where documents begin.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torch_ref.numerics import wide


def starts(segments_BT: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Where a document begins: a token whose segment is not that of the token before it."""
    before_BT = F.pad(segments_BT[:, :-1], (1, 0))
    return (segments_BT != 0) & (segments_BT != before_BT)


def causal_conv(
    x_BTF: Float[Tensor, "b t f"],
    kernel_KF: Float[Tensor, "k f"],
    bias_F: Float[Tensor, " f"] | None,
    segments_BT: Int[Tensor, "b t"],
    state_BJF: Float[Tensor, "b j f"] | None = None,
) -> tuple[Float[Tensor, "b t f"], Float[Tensor, "b j f"] | None]:
    """Depthwise convolution, `y_t = silu(sum_k kernel_k x_(t-K+1+k) + bias)`: the last tap reads the token itself.

    Args:
        state_BJF: the last K - 1 tokens of each row, zero before its first; padding between them and the new tokens, or
            among these, is skipped. Without it, a tap that would read another document or padding reads zero.

    Returns:
        y in the dtype of x, and the last K - 1 tokens of each row if a state was handed in.
    """
    taps = kernel_KF.shape[0]
    if state_BJF is None:
        padded_BSF, segments_BS = F.pad(x_BTF, (0, 0, taps - 1, 0)), F.pad(segments_BT, (taps - 1, 0))
        return _convolve(padded_BSF, kernel_KF, bias_F, segments_BS).to(x_BTF.dtype), None
    joined_BSF = torch.cat([state_BJF, x_BTF.to(state_BJF.dtype)], dim=1)
    if x_BTF.shape[1] == 1:
        state = torch.where((segments_BT != 0)[..., None], joined_BSF[:, 1:], state_BJF)
        return _convolve(joined_BSF, kernel_KF, bias_F).to(x_BTF.dtype), state
    # Real tokens move to the front, are convolved there, and each goes back to its place.
    real_BS = F.pad(segments_BT != 0, (taps - 1, 0), value=True)
    rank_BS = torch.cumsum(real_BS, dim=1)
    front_BS = torch.argsort((~real_BS).int(), dim=1, stable=True)
    joined_BSF = joined_BSF.take_along_dim(front_BS[..., None], dim=1)
    y_BTF = _convolve(joined_BSF, kernel_KF, bias_F).to(x_BTF.dtype)
    y_BTF = y_BTF.take_along_dim((rank_BS[:, taps - 1 :, None] - taps).clamp(min=0), dim=1)
    last_BJ = rank_BS[:, -1:] - (taps - 1) + torch.arange(taps - 1, device=x_BTF.device)
    return y_BTF, joined_BSF.take_along_dim(last_BJ[..., None], dim=1)


def _convolve(
    before_BSF: Tensor, kernel_KF: Tensor, bias_F: Tensor | None, segments_BS: Tensor | None = None
) -> Tensor:
    """The convolution of all but the first K - 1 tokens; with segments, of tokens of one document."""
    (taps, _), width = kernel_KF.shape, wide(before_BSF.dtype)
    t = before_BSF.shape[1] - taps + 1
    y_BTF = torch.zeros((), dtype=width, device=before_BSF.device) if bias_F is None else bias_F.to(width)
    for k in range(taps):
        tap_BTF = before_BSF[:, k : k + t].to(width) * kernel_KF[k].to(width)
        if segments_BS is not None:
            tap_BTF = torch.where((segments_BS[:, k : k + t] == segments_BS[:, taps - 1 :])[..., None], tap_BTF, 0)
        y_BTF = y_BTF + tap_BTF
    return F.silu(y_BTF)
