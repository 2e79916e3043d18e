"""Scaled dot-product attention: one function, two kernels.

A query sees a key when both belong to the same document (equal segment; 0 is padding) and the key does not lie after it
(position). A query that sees no key gets zero. `xla` is the readable reference, named as in `jaxlm`; every other name
is PyTorch's own fused kernel, tested against it, forward and backward.

Shapes: B batch, T query length, S key length, N heads, K kv heads, G = N/K queries of one kv head, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from torch_ref.numerics import wide_matmul


class Places(NamedTuple):
    """Where tokens stand: position within the document, and the document (segment), 0 for padding."""

    positions: Int[Tensor, "b s"]
    segments: Int[Tensor, "b s"]


def attention(
    q_BTNH: Float[Tensor, "b t n h"],
    k_BSKH: Float[Tensor, "b s k h"],
    v_BSKH: Float[Tensor, "b s k h"],
    q_places: Places,
    k_places: Places,
    *,
    impl: str = "auto",
    aligned: bool = False,
) -> Float[Tensor, "b t n h"]:
    """Causal attention within documents (Vaswani et al. 2017, equation 1; grouped heads: Ainslie et al. 2023).

    Args:
        q_places, k_places: positions and segments of queries [B, T] and keys [B, S].
        impl: `xla`, the fast kernel by jaxlm's names for its own (`blockwise`, `cudnn`), or `auto` for the dtype.
        aligned: queries and keys are the same tokens in the same order. Neither kernel needs this here.

    Returns:
        The mixed values [B, T, N, H], in the dtype of `v`. Softmax runs in float32 or wider.
    """
    if impl == "auto":
        impl = default_impl(q_BTNH, aligned)
    if impl == "xla":
        return _xla(q_BTNH, k_BSKH, v_BSKH, q_places, k_places)
    if impl in ("blockwise", "cudnn"):
        return _sdpa(q_BTNH, k_BSKH, v_BSKH, q_places, k_places)
    raise ValueError(f"unknown attention implementation {impl!r}")


def cached_attention(
    q_BTNH: Float[Tensor, "b t n h"],
    keys_BKHS: Float[Tensor, "b k h s"],
    values_BKSH: Float[Tensor, "b k s h"],
    q_places: Places,
    k_places: Places,
) -> Float[Tensor, "b t n h"]:
    """`attention` over keys and values in the order in which a cache keeps them.

    Both products are plain matrix products of the cache as it lies, so a decoding step moves nothing but its query.
    """
    (b, t, n, h), (_, k, _, s) = q_BTNH.shape, keys_BKHS.shape
    q_BKRH = q_BTNH.transpose(1, 2).reshape(b, k, -1, h)  # R = G T, all that read one kv head
    scores_BNTS = wide_matmul(q_BKRH, keys_BKHS).reshape(b, n, t, s) * h**-0.5
    probabilities_BNTS = _softmax(scores_BNTS, visible(q_places, k_places)[:, None])
    out_BKRH = probabilities_BNTS.to(values_BKSH.dtype).reshape(b, k, -1, s) @ values_BKSH
    return out_BKRH.reshape(b, n, t, h).transpose(1, 2)


def default_impl(q_BTNH: Float[Tensor, "b t n h"], aligned: bool) -> str:
    """The fastest implementation for this dtype; float64 is asked for parity, which wants the reference."""
    return "xla" if q_BTNH.dtype == torch.float64 else "blockwise"


def visible(q: Places, k: Places) -> Bool[Tensor, "b t s"]:
    """Which keys each query sees."""
    same_document = (q.segments[:, :, None] == k.segments[:, None, :]) & (q.segments != 0)[:, :, None]
    return same_document & (q.positions[:, :, None] >= k.positions[:, None, :])


def _xla(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, q_places: Places, k_places: Places) -> Tensor:
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    q_BNTH = q_BTNH.transpose(1, 2)
    k_BNSH, v_BNSH = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k_BSKH, v_BSKH))
    mask_B1TS = visible(q_places, k_places)[:, None]
    scores_BNTS = wide_matmul(q_BNTH, k_BNSH.mT) * q_BTNH.shape[-1] ** -0.5
    probabilities_BNTS = _softmax(scores_BNTS, mask_B1TS)
    return (probabilities_BNTS.to(v_BSKH.dtype) @ v_BNSH).transpose(1, 2).to(v_BSKH.dtype)


def _softmax(scores_BNTS: Tensor, mask_B1TS: Tensor) -> Tensor:
    """Softmax over the keys that are seen; zero everywhere when there are none."""
    scores_BNTS = scores_BNTS.masked_fill(~mask_B1TS, -torch.inf)
    top = scores_BNTS.detach().amax(dim=-1, keepdim=True)
    weights = torch.exp(scores_BNTS - torch.where(torch.isfinite(top), top, 0))
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1)


def _sdpa(q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, q_places: Places, k_places: Places) -> Tensor:
    """`scaled_dot_product_attention`; what it does with an empty row differs, so such rows see all and become zero."""
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    q_BNTH = q_BTNH.transpose(1, 2)
    k_BNSH, v_BNSH = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (k_BSKH, v_BSKH))
    mask_B1TS = visible(q_places, k_places)[:, None]
    seen_B1T1 = mask_B1TS.any(dim=-1, keepdim=True)
    out_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_B1TS | ~seen_B1T1)
    return torch.where(seen_B1T1, out_BNTH, 0).transpose(1, 2).to(v_BSKH.dtype)
