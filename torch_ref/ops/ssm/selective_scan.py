"""Mamba's selective scan (S6).

Where no state is handed in, rows may be packed: a document begins where the segment is another than one token before,
and nothing crosses that boundary, forward or backward; what is carried is multiplied by zero. With a state a row is one
document that goes on. Padding (segment 0) leaves the state as it is; its outputs are finite and mean nothing. Whatever
the inputs are, states and sums are float32 or wider.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_ref.numerics import wide
from torch_ref.ops.ssm.convolution import starts


def softplus(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(1 + exp(x)); PyTorch's own is the identity above 20, which float64 can tell from it."""
    return torch.logaddexp(x, torch.zeros_like(x))


def selective_scan(
    u_BTF: Float[Tensor, "b t f"],
    dt_BTF: Float[Tensor, "b t f"],
    a_FP: Float[Tensor, "f p"],
    b_BTP: Float[Tensor, "b t p"],
    c_BTP: Float[Tensor, "b t p"],
    d_F: Float[Tensor, " f"],
    segments_BT: Int[Tensor, "b t"],
    state_BPF: Float[Tensor, "b p f"] | None = None,
    *,
    chunk: int = 8,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b t f"], Float[Tensor, "b p f"]]:
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
    u_wide = u_BTF.to(width)
    dt_BTF = torch.where(real_BT[..., None], dt_BTF.to(width), 0)
    keep_BT, h_BPF = carried_decay(segments_BT, state_BPF, a_FP.shape[::-1], width)
    inputs = (dt_BTF, dt_BTF * u_wide, b_BTP.to(width), c_BTP.to(width), keep_BT)
    if impl not in ("sequential", "chunked", "auto"):
        raise ValueError(f"unknown scan implementation {impl!r}")
    if impl == "sequential" or u_BTF.shape[1] == 1:
        y_BTF, h_BPF = _scan(a_FP.T.to(width), h_BPF, *inputs)
    else:
        y_BTF, h_BPF = _scan_chunks(a_FP.T.to(width), h_BPF, inputs, chunk)
    return (y_BTF + d_F.to(width) * u_wide).to(u_BTF.dtype), h_BPF


def carried_decay(
    segments_BT: Tensor, state: Tensor | None, shape: tuple[int, ...], width: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What of the state before reaches each token, 1 or 0, and the state before the first."""
    if state is None:
        empty = torch.zeros(segments_BT.shape[0], *shape, dtype=width, device=segments_BT.device)
        return (~starts(segments_BT)).to(width), empty
    return torch.ones(segments_BT.shape, dtype=width, device=segments_BT.device), state.to(width)


def _scan(
    a_PF: Tensor, h_BPF: Tensor, dt_BTF: Tensor, w_BTF: Tensor, b_BTP: Tensor, c_BTP: Tensor, keep_BT: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token."""
    ys, tokens = [], (x.unbind(1) for x in (dt_BTF, w_BTF, b_BTP, c_BTP, keep_BT))
    for dt_BF, w_BF, b_BP, c_BP, keep_B in zip(*tokens, strict=True):
        decay_BPF = torch.exp(dt_BF[:, None] * a_PF) * keep_B[:, None, None]
        h_BPF = decay_BPF * h_BPF + w_BF[:, None] * b_BP[:, :, None]
        ys.append(torch.sum(h_BPF * c_BP[:, :, None], dim=1))
    return torch.stack(ys, dim=1), h_BPF


def _scan_chunks(a_PF: Tensor, h_BPF: Tensor, inputs: tuple[Tensor, ...], chunk: int) -> tuple[Tensor, Tensor]:
    ys = []
    for tokens in zip(*(x.split(chunk, dim=1) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            y_BQF, h_BPF = checkpoint(_scan_chunk, a_PF, h_BPF, *tokens, use_reentrant=False)
        else:
            y_BQF, h_BPF = _scan_chunk(a_PF, h_BPF, *tokens)
        ys.append(y_BQF)
    return torch.cat(ys, dim=1), h_BPF


def _scan_chunk(
    a_PF: Tensor, h_BPF: Tensor, dt_BQF: Tensor, w_BQF: Tensor, b_BQP: Tensor, c_BQP: Tensor, keep_BQ: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence with all that is not recurrent done for the whole chunk: one operation a token is left."""
    decay_BQPF = torch.exp(dt_BQF[:, :, None] * a_PF) * keep_BQ[:, :, None, None]
    new_BQPF, states = w_BQF[:, :, None] * b_BQP[..., None], []
    for decay_BPF, new_BPF in zip(decay_BQPF.unbind(1), new_BQPF.unbind(1), strict=True):
        h_BPF = torch.addcmul(new_BPF, decay_BPF, h_BPF)
        states.append(h_BPF)
    return (c_BQP[:, :, None] @ torch.stack(states, dim=1))[:, :, 0], h_BPF
