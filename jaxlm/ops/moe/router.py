"""The router of a mixture of experts: which experts a token chooses, with which weights, and how evenly.

All of it runs in float32 or wider, and ties go to the expert of the lower index.

Shapes: T tokens (one or more axes), E experts, K experts of one token, G groups of experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm import typed_jax


class Routing(NamedTuple):
    """What the router decided for each token."""

    weights: Float[Array, "*t k"]
    """Of the chosen experts, best first."""
    experts: Int[Array, "*t k"]
    """The chosen experts; E for an assignment that is not carried out: of padding, or beyond the capacity."""
    scores: Float[Array, "*t e"]
    """Of all experts, without the selection bias."""
    biased: Float[Array, "*t e"]
    """Of all experts, with the selection bias: what was chosen by. It has no gradient."""


class Balance(NamedTuple):
    """How evenly the real tokens of a microbatch use the experts. The four means have gradients on the logits."""

    load: Int[Array, " e"]
    """Assignments that each expert was chosen for, dropped ones among them."""
    dropped: Int[Array, ""]
    """Assignments beyond the capacity."""
    balance: Float[Array, ""]
    """E sum_e f_e P_e, f the share of assignments and P the mean score: 1 where either is uniform."""
    importance: Float[Array, ""]
    """Squared coefficient of variation of the scores' sums over tokens, 0 where they are equal."""
    z: Float[Array, ""]
    """Mean squared logsumexp of the logits."""
    entropy: Float[Array, ""]
    """Mean entropy of a token's scores in nats, at most ln E."""


def add_noise(
    logits: Float[Array, "*t e"], noise_logits: Float[Array, "*t e"], normal: Float[Array, "*t e"]
) -> Float[Array, "*t e"]:
    """`logits + normal * softplus(noise_logits)` (Shazeer et al. 2017, equation 4); `normal` is standard normal."""
    return logits + normal * jax.nn.softplus(noise_logits)


def route(
    logits: Float[Array, "*t e"],
    bias: Float[Array, " e"] | None = None,
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
    # The bias steers the choice alone; weights come from the scores without it. So the bias moves load and never the
    # output of a chosen expert (Wang et al. 2024).
    scores = jax.nn.softmax(logits, axis=-1) if router == "softmax" else jax.nn.sigmoid(logits)
    biased = jax.lax.stop_gradient(scores if bias is None else scores + bias)
    eligible = biased if n_groups == 1 else _best_groups(biased, n_groups, top_groups)
    _, experts = jax.lax.top_k(eligible, top_k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)  # the 1e-20 of DeepSeek-V3
    return Routing(weights * scale, experts, scores, biased)


def _best_groups(biased: Array, n_groups: int, top_groups: int) -> Array:
    """-inf for the experts outside a token's best groups."""
    grouped = biased.reshape(*biased.shape[:-1], n_groups, -1)
    best_two, _ = jax.lax.top_k(grouped, 2)
    _, groups = jax.lax.top_k(jnp.sum(best_two, axis=-1), top_groups)
    # -inf, and not 0 as in the first public code: biased scores may be negative, and an expert of a group that was not
    # chosen must lose against each of them.
    kept = jnp.any(groups[..., None] == jnp.arange(n_groups), axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)


def mask_padding(routing: Routing, real: Bool[Array, "*t"]) -> Routing:
    """Padding is sent to no expert."""
    n_experts = routing.scores.shape[-1]
    return routing._replace(experts=jnp.where(real[..., None], routing.experts, n_experts))


def drop_overflow(routing: Routing, factor: float) -> Routing:
    """Keep the first `ceil(factor T K / E)` assignments of each expert, in the order of the tokens; drop the others."""
    experts, n_experts = routing.experts, routing.scores.shape[-1]
    places = math.ceil(factor * experts.size / n_experts)
    flat = experts.reshape(-1)
    # The rank of an assignment among those of its expert is its place after a stable sort less the first place of that
    # expert: earlier tokens keep their places. Expert E, none, has a first place too, hence E + 1.
    order = jnp.argsort(flat, stable=True)
    starts = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1, dtype=flat.dtype))
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype)) - starts[flat]
    return routing._replace(experts=jnp.where(rank < places, flat, n_experts).reshape(experts.shape))


def balance(logits: Float[Array, "*t e"], chosen: Routing, carried_out: Routing, real: Bool[Array, "*t"]) -> Balance:
    """Load, drops and the terms of the losses, over real tokens.

    Args:
        chosen: before drops, `carried_out`: after them. Both without padding.
    """
    n_experts, top_k = logits.shape[-1], chosen.experts.shape[-1]
    # Every mean is over real tokens. A microbatch of padding alone divides by 1, so that it gives 0 and not NaN.
    tokens = jnp.maximum(jnp.sum(real), 1).astype(logits.dtype)
    weight = real[..., None].astype(logits.dtype)
    over_tokens = tuple(range(logits.ndim - 1))

    # Integers: the load of several microbatches is added exactly, in any order.
    load = jnp.sum(
        chosen.experts[..., None] == jnp.arange(n_experts), axis=(*over_tokens, logits.ndim - 1), dtype=jnp.int32
    )
    dropped = jnp.sum((carried_out.experts == n_experts) & (chosen.experts != n_experts), dtype=jnp.int32)
    # Sigmoid scores do not sum to 1, so all statistics are of the scores over their sum; for softmax that changes
    # rounding alone.
    shares = chosen.scores / (jnp.sum(chosen.scores, axis=-1, keepdims=True) + 1e-20)
    mean_share = jnp.sum(shares * weight, axis=over_tokens) / tokens
    # x log x goes to 0 with x, but log 0 is -inf and 0 * -inf is NaN: the smallest normal number stands in.
    tiny = typed_jax.finfo(shares.dtype).tiny
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, tiny)), axis=-1, keepdims=True)
    partition = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return Balance(
        load,
        dropped,
        balance=n_experts * jnp.sum(load / (tokens * top_k) * mean_share),
        importance=jnp.var(mean_share) * n_experts**2,  # shares sum to 1, so their mean is 1 / E
        z=jnp.sum(partition**2 * weight) / tokens,
        entropy=jnp.sum(entropy * weight) / tokens,
    )
