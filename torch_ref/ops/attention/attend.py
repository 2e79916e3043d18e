"""Scaled dot-product attention: one function, two kernels.

A query sees a key when both belong to the same document (equal segments that are not 0, which is padding), the key does
not lie after it (position), and fewer than `window` tokens back. A query that sees no key gets zero. `xla` is the
readable reference, named as in `jaxlm`; every other name is PyTorch's own fused kernel, tested against it, forward and
backward.

Keys that are seen by other rules (three kinds of sinks) are other calls: each gives what it mixed and the log-sum-exp
of its scores (`Mixed`), from which `merge` makes one softmax over all of them. PyTorch's kernel has no soft cap and
gives no log-sum-exp; where one is needed, the reference takes its place.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim,
F retained first tokens, M sink tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torch_ref.numerics import wide, wide_matmul


class Places(NamedTuple):
    """Where tokens stand: position within the document, and the document (segment), 0 for padding."""

    positions: Int[Tensor, "b s"]
    segments: Int[Tensor, "b s"]


class Mixed(NamedTuple):
    """What queries take from some of the keys they see, in float32 or wider."""

    out: Float[Tensor, "b t n h"]
    """Values weighted by the softmax over these keys alone; zero where none is seen."""
    lse: Float[Tensor, "b t n"]
    """Logarithm of the sum of the exponentials of the scores; -inf where none is seen."""


def attention(
    q_BTNH: Float[Tensor, "b t n h"],
    k_BSKH: Float[Tensor, "b s k h"],
    v_BSKH: Float[Tensor, "b s k h"],
    q_places: Places,
    k_places: Places,
    *,
    impl: str = "auto",
    aligned: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """Causal attention within documents (Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023).

    Args:
        q_places, k_places: positions and segments of queries [B, T] and keys [B, S].
        impl: `xla`, the fast kernel by any of jaxlm's names for its own (`blockwise`, `cudnn`, `splash`), or `auto` for
            the dtype.
        aligned: queries and keys are the same tokens in the same order. Neither kernel needs this here.
        window: tokens that a query sees, itself included (Beltagy et al. 2020, section 3.1); 0: all before it.
        softcap: scores are bounded, `cap tanh(score / cap)` (Gemma 2, section 2); 0: they are not.

    Returns:
        The mixed values [B, T, N, H], in the dtype of `v`. Softmax runs in float32 or wider.
    """
    impl = default_impl(q_BTNH, aligned, fused=not softcap) if impl == "auto" else impl
    if impl in ("blockwise", "cudnn", "splash") and not softcap:
        return _sdpa(q_BTNH, k_BSKH, v_BSKH, visible(q_places, k_places, window))
    return _mixed(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, impl, window, softcap, v_BSKH.dtype).out


def attend(
    q_BTNH: Float[Tensor, "b t n h"],
    k_BSKH: Float[Tensor, "b s k h"],
    v_BSKH: Float[Tensor, "b s k h"],
    q_places: Places,
    k_places: Places,
    *,
    impl: str = "auto",
    aligned: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> Mixed:
    """`attention`, to be merged with other keys."""
    impl = default_impl(q_BTNH, aligned, fused=False) if impl == "auto" else impl
    return _mixed(q_BTNH, k_BSKH, v_BSKH, q_places, k_places, impl, window, softcap, wide(q_BTNH.dtype))


def attend_first(
    q_BTNH: Float[Tensor, "b t n h"],
    k_BTKH: Float[Tensor, "b t k h"],
    v_BTKH: Float[Tensor, "b t k h"],
    places: Places,
    *,
    keep_first: int,
    window: int,
    softcap: float = 0.0,
) -> Mixed:
    """Attention to the first tokens of each document, once they have left the window (Xiao et al. 2023, section 3.2).

    Queries and keys are the same tokens in the same order. Here the mask of all pairs is made, in jaxlm it is not.
    """
    mask_BTS = visible(places, places, beyond=window) & (places.positions < keep_first)[:, None, :]
    q_BNTH, k_BNSH, v_BNSH = _heads_first(q_BTNH, k_BTKH, v_BTKH)
    return _mix(wide_matmul(q_BNTH, k_BNSH.mT), v_BNSH, mask_BTS[:, None], softcap, wide(q_BTNH.dtype))


def attend_sinks(
    q_BTNH: Float[Tensor, "b t n h"],
    k_MKH: Float[Tensor, "m k h"],
    v_MKH: Float[Tensor, "m k h"],
    segments_BT: Int[Tensor, "b t"],
    *,
    softcap: float = 0.0,
) -> Mixed:
    """Attention to M keys and values that have no place: every token sees them, padding does not."""
    q_BNTH, k_1NMH, v_1NMH = _heads_first(q_BTNH, k_MKH[None], v_MKH[None])
    mask_B1T1 = (segments_BT != 0)[:, None, :, None]
    return _mix(wide_matmul(q_BNTH, k_1NMH.mT), v_1NMH, mask_B1T1, softcap, wide(q_BTNH.dtype))


def merge(
    parts: Sequence[Mixed], sink_logits_N: Float[Tensor, " n"] | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b t n h"]:
    """One softmax over the keys of all parts, which are disjoint: each part weighs the exponential of its log-sum-exp.

    Args:
        sink_logits_N: a score of each head that takes part in the softmax and has no value (gpt-oss).
        dtype: of the result.
    """
    lse_PBTN = torch.stack([part.lse for part in parts])
    top_BTN = lse_PBTN.detach().amax(dim=0)
    if sink_logits_N is not None:
        sink_logits_N = sink_logits_N.to(lse_PBTN.dtype)
        top_BTN = torch.maximum(top_BTN, sink_logits_N.detach())
    top_BTN = torch.where(torch.isfinite(top_BTN), top_BTN, 0)
    weights_PBTN = torch.exp(lse_PBTN - top_BTN)
    total_BTN = weights_PBTN.sum(dim=0)
    if sink_logits_N is not None:
        total_BTN = total_BTN + torch.exp(sink_logits_N - top_BTN)
    weights_PBTN = weights_PBTN / torch.where(total_BTN > 0, total_BTN, 1)
    out_PBTNH = torch.stack([part.out for part in parts]) * weights_PBTN[..., None]
    return out_PBTNH.sum(dim=0).to(dtype)


def cached_attention(
    q_BTNH: Float[Tensor, "b t n h"],
    keys_BKHS: Float[Tensor, "b k h s"],
    values_BKSH: Float[Tensor, "b k s h"],
    q_places: Places,
    k_places: Places,
    *,
    window: int = 0,
    softcap: float = 0.0,
) -> Float[Tensor, "b t n h"]:
    """`attention` over keys and values in the order in which a cache keeps them.

    Both products are plain matrix products of the cache as it lies, so a decoding step moves nothing but its query.
    """
    mask_BTS = visible(q_places, k_places, window)
    return _cached(q_BTNH, keys_BKHS, values_BKSH, mask_BTS, softcap, values_BKSH.dtype).out


def cached_attend(
    q_BTNH: Float[Tensor, "b t n h"],
    keys_BKHS: Float[Tensor, "b k h s"],
    values_BKSH: Float[Tensor, "b k s h"],
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


def default_impl(q_BTNH: Float[Tensor, "b t n h"], aligned: bool, fused: bool = True) -> str:
    """The fastest implementation for this dtype; float64 is asked for parity, which wants the reference."""
    return "xla" if q_BTNH.dtype == torch.float64 or not fused else "blockwise"


def visible(q: Places, k: Places, window: int = 0, beyond: int = 0) -> Bool[Tensor, "b t s"]:
    """Which keys each query sees: those fewer than `window` tokens back (0: all), and `beyond` or more."""
    same_document = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    distance = q.positions[:, :, None] - k.positions[:, None, :]
    seen = same_document & (distance >= beyond)
    return seen & (distance < window) if window else seen


def _mixed(
    q_BTNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    q_places: Places,
    k_places: Places,
    impl: str,
    window: int,
    softcap: float,
    dtype: torch.dtype,
) -> Mixed:
    """The kernel that knows every option; `out` in `dtype`."""
    if impl not in ("xla", "blockwise", "cudnn", "splash"):
        raise ValueError(f"unknown attention implementation {impl!r}")
    q_BNTH, k_BNSH, v_BNSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
    mask_B1TS = visible(q_places, k_places, window)[:, None]
    return _mix(wide_matmul(q_BNTH, k_BNSH.mT), v_BNSH, mask_B1TS, softcap, dtype)


def _cached(
    q_BTNH: Tensor, keys_BKHS: Tensor, values_BKSH: Tensor, mask_BTS: Tensor, softcap: float, dtype: torch.dtype
) -> Mixed:
    (b, t, n, h), (_, k, _, s) = q_BTNH.shape, keys_BKHS.shape
    q_BKRH = q_BTNH.transpose(1, 2).reshape(b, k, -1, h)  # R = G T, all that read one kv head
    products_BNTS = wide_matmul(q_BKRH, keys_BKHS).reshape(b, n, t, s)
    weights_BNTS, lse_BNT = _softmax(_capped(products_BNTS * h**-0.5, softcap), mask_BTS[:, None])
    weights_BKRS = weights_BNTS.to(values_BKSH.dtype).reshape(b, k, -1, s)
    out_BKRH = _matmul(weights_BKRS, values_BKSH, dtype)
    return Mixed(out_BKRH.reshape(b, n, t, h).transpose(1, 2), lse_BNT.transpose(1, 2))


def _mix(products_BNTS: Tensor, v_BNSH: Tensor, mask: Tensor, softcap: float, dtype: torch.dtype) -> Mixed:
    """From products of queries and keys to mixed values."""
    scores_BNTS = _capped(products_BNTS * v_BNSH.shape[-1] ** -0.5, softcap)
    weights_BNTS, lse_BNT = _softmax(scores_BNTS, mask)
    out_BNTH = _matmul(weights_BNTS.to(v_BNSH.dtype), v_BNSH, dtype)
    return Mixed(out_BNTH.transpose(1, 2), lse_BNT.transpose(1, 2))


def _matmul(weights: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in the dtype of its operands, or wide."""
    return (weights @ values).to(dtype) if dtype == values.dtype else wide_matmul(weights, values)


def _softmax(scores_BNTS: Tensor, mask_B1TS: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that are seen, zero everywhere when there are none, and the log-sum-exp [B, N, T]."""
    scores_BNTS = scores_BNTS.masked_fill(~mask_B1TS, -torch.inf)
    top = scores_BNTS.detach().amax(dim=-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0)
    weights = torch.exp(scores_BNTS - top)
    total = weights.sum(dim=-1, keepdim=True)
    some = torch.where(total > 0, total, 1)
    lse = torch.where(total > 0, torch.log(some) + top, -torch.inf)
    return weights / some, lse[..., 0]


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def _heads_first(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, T, H] of the queries, and [B, N, S, H] of keys and values, repeated for the queries that share them."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k_BNSH, v_BNSH = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k_BSKH, v_BSKH))
    return q_BTNH.transpose(1, 2), k_BNSH, v_BNSH


def _sdpa(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, mask_BTS: Tensor) -> Tensor:
    """`scaled_dot_product_attention`; what it does with an empty row differs, so such rows see all and become zero."""
    q_BNTH, k_BNSH, v_BNSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
    mask_B1TS = mask_BTS[:, None]
    seen_B1T1 = mask_B1TS.any(dim=-1, keepdim=True)
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_B1TS | ~seen_B1T1)
    return torch.where(seen_B1T1, out_BNTH, 0).transpose(1, 2).to(v_BSKH.dtype)
