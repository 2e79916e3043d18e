"""The router of a mixture of experts: which experts a token chooses, with which weights, and how evenly.

All of it runs in float32 or wider, and ties go to the expert of the lower index.

Shapes: T tokens (one or more axes), E experts, K experts of one token, G groups of experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Routing(NamedTuple):
    """What the router decided for each token."""

    weights: Float[Tensor, "*t k"]
    """Of the chosen experts, best first."""
    experts: Int[Tensor, "*t k"]
    """The chosen experts; E for an assignment that is not carried out: of padding, or beyond the capacity."""
    scores: Float[Tensor, "*t e"]
    """Of all experts, without the selection bias."""
    biased: Float[Tensor, "*t e"]
    """Of all experts, with the selection bias: what was chosen by. It has no gradient."""


class Balance(NamedTuple):
    """How evenly the real tokens of a microbatch use the experts. The four means have gradients on the logits."""

    load: Int[Tensor, " e"]
    """Assignments that each expert was chosen for, dropped ones among them."""
    dropped: Int[Tensor, ""]
    """Assignments beyond the capacity."""
    balance: Float[Tensor, ""]
    """E sum_e f_e P_e, f the share of assignments and P the mean score: 1 where either is uniform."""
    importance: Float[Tensor, ""]
    """Squared coefficient of variation of the scores' sums over tokens, 0 where they are equal."""
    z: Float[Tensor, ""]
    """Mean squared logsumexp of the logits."""
    entropy: Float[Tensor, ""]
    """Mean entropy of a token's scores in nats, at most ln E."""


def add_noise(
    logits: Float[Tensor, "*t e"], noise_logits: Float[Tensor, "*t e"], normal: Float[Tensor, "*t e"]
) -> Float[Tensor, "*t e"]:
    """`logits + normal * softplus(noise_logits)` (Shazeer et al. 2017, equation 4); `normal` is standard normal."""
    return logits + normal * F.softplus(noise_logits, threshold=1e9)  # torch is linear above its threshold of 20


def route(
    logits: Float[Tensor, "*t e"],
    bias: Float[Tensor, " e"] | None = None,
    *,
    top_k: int,
    router: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    n_groups: int = 1,
    top_groups: int = 1,
) -> Routing:
    """Choose the `top_k` experts of each token by score + bias; their weights are the scores alone.

    With groups, a token chooses among the experts of its `top_groups` best groups, a group's score being the sum of its
    two best biased scores (DeepSeek-V3, section 2.1.2, equations 12 to 16).

    Args:
        logits: float32 or wider.
        bias: selection bias; it has no gradient (Wang et al. 2024).
        router: scores are `softmax` over the experts or `sigmoid` of each logit.
        renormalize: divide the weights by their sum.
        scale: multiplies the weights.
    """
    scores = torch.softmax(logits, dim=-1) if router == "softmax" else torch.sigmoid(logits)
    biased = (scores if bias is None else scores + bias).detach()
    eligible = biased if n_groups == 1 else _best_groups(biased, n_groups, top_groups)
    experts = _top_k(eligible, top_k)
    weights = scores.gather(-1, experts)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # the 1e-20 of DeepSeek-V3
    return Routing(weights * scale, experts, scores, biased)


def _top_k(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest, ties to the lower index: `torch.topk` promises no order."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :k]


def _best_groups(biased: Tensor, n_groups: int, top_groups: int) -> Tensor:
    """-inf for the experts outside a token's best groups."""
    grouped = biased.unflatten(-1, (n_groups, -1))
    best_two = grouped.gather(-1, _top_k(grouped, 2))
    groups = _top_k(best_two.sum(dim=-1), top_groups)
    kept = (groups[..., None] == torch.arange(n_groups, device=biased.device)).any(dim=-2)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def mask_padding(routing: Routing, real: Bool[Tensor, "*t"]) -> Routing:
    """Padding is sent to no expert."""
    return routing._replace(experts=routing.experts.masked_fill(~real[..., None], routing.scores.shape[-1]))


def drop_overflow(routing: Routing, factor: float) -> Routing:
    """Keep the first `ceil(factor T K / E)` assignments of each expert, in the order of the tokens; drop the others."""
    experts, n_experts = routing.experts, routing.scores.shape[-1]
    places = math.ceil(factor * experts.numel() / n_experts)
    flat = experts.flatten()
    rank = F.one_hot(flat, n_experts + 1).cumsum(dim=0).gather(1, flat[:, None])[:, 0] - 1
    return routing._replace(experts=flat.masked_fill(rank >= places, n_experts).reshape(experts.shape))


def balance(logits: Float[Tensor, "*t e"], chosen: Routing, carried_out: Routing, real: Bool[Tensor, "*t"]) -> Balance:
    """Load, drops and the terms of the losses, over real tokens.

    Args:
        chosen: before drops, `carried_out`: after them. Both without padding.
    """
    n_experts, top_k = logits.shape[-1], chosen.experts.shape[-1]
    tokens = real.sum().clamp(min=1).to(logits.dtype)
    weight = real[..., None].to(logits.dtype)
    over_tokens = tuple(range(logits.ndim - 1))

    load = torch.bincount(chosen.experts.flatten(), minlength=n_experts + 1)[:n_experts]
    dropped = ((carried_out.experts == n_experts) & (chosen.experts != n_experts)).sum()
    shares = chosen.scores / (chosen.scores.sum(dim=-1, keepdim=True) + 1e-20)
    mean_share = (shares * weight).sum(dim=over_tokens) / tokens
    entropy = -(shares * shares.clamp(min=torch.finfo(shares.dtype).tiny).log()).sum(dim=-1, keepdim=True)
    partition = torch.logsumexp(logits, dim=-1, keepdim=True)
    return Balance(
        load,
        dropped,
        balance=n_experts * (load / (tokens * top_k) * mean_share).sum(),
        importance=mean_share.var(correction=0) * n_experts**2,  # shares sum to 1, so their mean is 1 / E
        z=(partition**2 * weight).sum() / tokens,
        entropy=(entropy * weight).sum() / tokens,
    )
