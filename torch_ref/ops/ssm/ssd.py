"""Mamba-2's scan (SSD). Packed rows and padding are treated as in `selective_scan`.

Shapes: B batch, T length, F channels, P state, K taps of the convolution, J = K - 1; N heads in G groups of M, H head
dim; Q tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torch_ref.numerics import wide
from torch_ref.ops.ssm.selective_scan import carried_decay


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
    keep_BT, state_BNHP = carried_decay(segments_BT, state_BNHP, (n, h, p), width)
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
