"""Selective state spaces: the causal convolution, Mamba's scan (S6) and Mamba-2's (SSD).

Where no state is handed in, rows may be packed: a document begins where the segment is another than one token before,
and nothing crosses that boundary, forward or backward; what is carried is multiplied by zero. With a state a row is one
document that goes on. Padding (segment 0) leaves the state as it is; its outputs are finite and mean nothing. Whatever
the inputs are, states and sums are float32 or wider.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    keep_BT, h_BPF = _carried(segments_BT, state_BPF, a_FP.shape[::-1], width)
    inputs = (dt_BTF, dt_BTF * u_wide, b_BTP.to(width), c_BTP.to(width), keep_BT)
    if impl not in ("sequential", "chunked", "auto"):
        raise ValueError(f"unknown scan implementation {impl!r}")
    if impl == "sequential" or u_BTF.shape[1] == 1:
        y_BTF, h_BPF = _scan(a_FP.T.to(width), h_BPF, *inputs)
    else:
        y_BTF, h_BPF = _scan_chunks(a_FP.T.to(width), h_BPF, inputs, chunk)
    return (y_BTF + d_F.to(width) * u_wide).to(u_BTF.dtype), h_BPF


def _carried(
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


def ssd(
    x_BTNH: Float[Tensor, "b t n h"],
    dt_BTN: Float[Tensor, "b t n"],
    a_N: Float[Tensor, " n"],
    b_BTGP: Float[Tensor, "b t g p"],
    c_BTGP: Float[Tensor, "b t g p"],
    d_N: Float[Tensor, " n"],
    segments_BT: Int[Tensor, "b t"],
    state_BNHP: Float[Tensor, "b n h p"] | None = None,
    *,
    chunk: int = 64,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b t n h"], Float[Tensor, "b n h p"]]:
    """Mamba-2's scan: the recurrence of `selective_scan` with one A and one dt a head (Dao & Gu 2024, section 5).

    Heads n share the B and C of group `n // (N / G)`. `chunked` computes a chunk as masked attention without softmax
    and carries the state from chunk to chunk (section 6); the backward pass keeps the states between chunks alone.

    Args and returns as `selective_scan`.
    """
    width, real_BT = wide(x_BTNH.dtype), segments_BT != 0
    (b, t, n, h), (g, p) = x_BTNH.shape, b_BTGP.shape[2:]
    x_wide = x_BTNH.to(width)
    dt_BTN = torch.where(real_BT[..., None], dt_BTN.to(width), 0)
    keep_BT, state_BNHP = _carried(segments_BT, state_BNHP, (n, h, p), width)
    state = state_BNHP.reshape(b, g, n // g, h, p)
    w_BTGMH = (x_wide * dt_BTN[..., None]).reshape(b, t, g, n // g, h)
    log_BTGM = (dt_BTN * a_N.to(width)).reshape(b, t, g, n // g)
    inputs = (w_BTGMH, log_BTGM, b_BTGP.to(width), c_BTGP.to(width))
    if impl == "sequential" or t == 1:
        y_BTGMH, state = _ssd_tokens(*inputs, keep_BT, state)
    elif impl in ("chunked", "auto"):
        y_BTGMH, state = _ssd_chunks(*inputs, keep_BT, state, chunk)
    else:
        raise ValueError(f"unknown scan implementation {impl!r}")
    y_BTNH = y_BTGMH.reshape(b, t, n, h) + d_N.to(width)[:, None] * x_wide
    return y_BTNH.to(x_BTNH.dtype), state.reshape(b, n, h, p)


def _ssd_tokens(w: Tensor, log: Tensor, b: Tensor, c: Tensor, keep_BT: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    ys, tokens = [], (x.unbind(1) for x in (w, log, b, c, keep_BT))
    for w_BGMH, log_BGM, b_BGP, c_BGP, keep_B in zip(*tokens, strict=True):
        decay_BGM = torch.exp(log_BGM) * keep_B[:, None, None]
        state = decay_BGM[..., None, None] * state + w_BGMH[..., None] * b_BGP[:, :, None, None]
        ys.append(torch.einsum("bgmhp,bgp->bgmh", state, c_BGP))
    return torch.stack(ys, dim=1), state


def _ssd_chunks(
    w: Tensor, log: Tensor, b: Tensor, c: Tensor, keep_BT: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    # The documents of a row, numbered from the state that was handed in: a token sees what has its number.
    number_BT = torch.cumsum(keep_BT == 0, dim=1)
    before_BT = F.pad(number_BT[:, :-1], (1, 0))
    inputs = (w.permute(0, 2, 3, 1, 4), log.permute(0, 2, 3, 1), b.transpose(1, 2), c.transpose(1, 2))
    chunks = zip(
        *(x.split(chunk, dim=dim) for x, dim in zip(inputs, (3, 3, 2, 2), strict=True)),
        *(x.split(chunk, dim=1) for x in (number_BT, before_BT)),
        strict=True,
    )
    ys = []
    for tokens in chunks:
        if torch.is_grad_enabled():
            state, y_BGMQH = checkpoint(_ssd_chunk, state, *tokens, use_reentrant=False)
        else:
            state, y_BGMQH = _ssd_chunk(state, *tokens)
        ys.append(y_BGMQH)
    return torch.cat(ys, dim=3).permute(0, 3, 1, 2, 4), state


def _ssd_chunk(
    h_BGMHP: Tensor,
    w_BGMQH: Tensor,
    log_BGMQ: Tensor,
    b_BGQP: Tensor,
    c_BGQP: Tensor,
    number_BQ: Tensor,
    before_BQ: Tensor,
) -> tuple[Tensor, Tensor]:
    """One chunk (Dao & Gu 2024, listing 1): attention inside, the state before it, the state after it."""
    seen_BQQ = torch.tril(number_BQ[:, :, None] == number_BQ[:, None, :])
    sum_BGMQ = torch.cumsum(log_BGMQ, dim=-1)
    between = sum_BGMQ[..., :, None] - sum_BGMQ[..., None, :]
    decay_BGMQQ = torch.exp(torch.where(seen_BQQ[:, None, None], between, -torch.inf))
    scores_BGQQ = c_BGQP @ b_BGQP.mT
    y_BGMQH = (scores_BGQQ[:, :, None] * decay_BGMQQ) @ w_BGMQH

    same_BQ = number_BQ == before_BQ[:, :1]  # no document has begun since the state
    since_BGMQ = torch.where(same_BQ[:, None, None], torch.exp(sum_BGMQ), 0)
    y_BGMQH = y_BGMQH + torch.einsum("bgtp,bgmhp->bgmth", c_BGQP, h_BGMHP) * since_BGMQ[..., None]

    until_BGMQ = decay_BGMQQ[..., -1, :]
    new_BGMHP = torch.einsum("bgmsh,bgsp->bgmhp", w_BGMQH * until_BGMQ[..., None], b_BGQP)
    return h_BGMHP * since_BGMQ[..., -1, None, None] + new_BGMHP, y_BGMQH
