"""Advantages: how much better a sample is than others of its prompt, or a token than its state promised.

    l^o, l^r = log-probability of a token under the policy that drew it, under the reference, at the temperature of
    sampling         R = reward of a sample         r = reward of a token         V = value         G = return

Shapes: B samples, one a row; T length; G groups of N samples of the same prompt.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.objectives.policy import KLKind, kl_estimate

Scaling = Literal["group", "batch", "none", "rloo"]


def advantages(
    rewards_GN: Float[Array, "g n"], valid_GN: Bool[Array, "g n"], *, scaling: Scaling = "group", eps: float = 1e-4
) -> Float[Array, "g n"]:
    """How much better a sample is than others of its prompt. Exactly 0 where the rewards of a group are equal.

    | scaling | advantage | source |
    |---|---|---|
    | group | (R - mean) / (std + eps), both of the group | Shao et al. 2024, section 4.1.2 |
    | batch | (R - mean of the group) / (std of the batch + eps) | Liu, Z. et al. 2025, section 3.2 |
    | none | R - mean of the group | Dr. GRPO: Liu, Z. et al. 2025, section 3.2 |
    | rloo | R - mean of the others | Ahmadian et al. 2024, eq. 7 |

    Standard deviations have ddof 1. A sample that is not valid has no part in any mean and gets 0; so does one alone.
    """
    count_G1 = jnp.sum(valid_GN, axis=1, keepdims=True)
    rewards_GN = jnp.where(valid_GN, rewards_GN, 0)
    mean_G1 = jnp.sum(rewards_GN, axis=1, keepdims=True) / jnp.maximum(count_G1, 1)
    # A mean is rounded: without this, a group of equal rewards would get that residue over eps.
    most_G1 = jnp.max(jnp.where(valid_GN, rewards_GN, -jnp.inf), axis=1, keepdims=True)
    least_G1 = jnp.min(jnp.where(valid_GN, rewards_GN, jnp.inf), axis=1, keepdims=True)
    distance_GN = jnp.where(valid_GN & (most_G1 > least_G1), rewards_GN - mean_G1, 0)
    if scaling == "none":
        return distance_GN
    if scaling == "rloo":
        return distance_GN * count_G1 / jnp.maximum(count_G1 - 1, 1)
    if scaling == "group":
        variance_G1 = jnp.sum(distance_GN**2, axis=1, keepdims=True) / jnp.maximum(count_G1 - 1, 1)
        return distance_GN / (jnp.sqrt(variance_G1) + eps)
    count = jnp.sum(count_G1)
    mean = jnp.sum(rewards_GN) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.where(valid_GN, (rewards_GN - mean) ** 2, 0)) / jnp.maximum(count - 1, 1)
    return distance_GN / (jnp.sqrt(variance) + eps)


def token_rewards(
    old_BT: Float[Array, "b t"],
    reference_BT: Float[Array, "b t"] | None,
    rewards_B: Float[Array, " b"],
    weights_BT: Float[Array, "b t"],
    *,
    kl_weight: float | Float[Array, ""] = 0.0,
    kl_kind: KLKind = "k1",
) -> Float[Array, "b t"]:
    """`r = -k (l^o - l^r)`, and R besides at the last trained token, which is the end token itself.

    Source: Stiennon et al. 2020, section 3.4; Ziegler et al. 2019, eq. 2. Tokens that are not trained get 0.
    """
    trained_BT = weights_BT != 0
    so_far_BT = jnp.cumsum(trained_BT, axis=1)
    last_BT = trained_BT & (so_far_BT == so_far_BT[:, -1:])
    rewards_BT = jnp.where(last_BT, rewards_B[:, None], 0)
    if reference_BT is None:
        return rewards_BT
    kl_BT = kl_estimate(jnp.where(trained_BT, old_BT, 0), jnp.where(trained_BT, reference_BT, 0), kind=kl_kind)
    return rewards_BT - kl_weight * kl_BT


class TokenAdvantages(NamedTuple):
    """Per trained token, 0 elsewhere."""

    advantages: Float[Array, "b t"]
    returns: Float[Array, "b t"]


def gae(
    rewards_BT: Float[Array, "b t"],
    values_BT: Float[Array, "b t"],
    weights_BT: Float[Array, "b t"],
    bootstrap_B: Float[Array, " b"],
    *,
    discount: float = 1.0,
    lam: float = 0.95,
) -> TokenAdvantages:
    """Generalised advantages: `d = r + g V' - V`, `A = d + g lam A'`, `G = A + V` (Schulman et al. 2016, eq. 16).

    The primes mean the next trained token of the sample; tokens between them are passed over.

    Args:
        values_BT: V of the state in which a token was drawn.
        bootstrap_B: V after the last token of a sample that was cut; 0 for one that ended.
    """

    def step(after: tuple[Array, Array], token: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        value_after_B, advantage_after_B = after
        reward_B, value_B, trained_B = token
        error_B = reward_B + discount * value_after_B - value_B
        advantage_B = error_B + discount * lam * advantage_after_B
        kept = jnp.where(trained_B, value_B, value_after_B), jnp.where(trained_B, advantage_B, advantage_after_B)
        return kept, jnp.where(trained_B, advantage_B, 0)

    trained_BT = weights_BT != 0
    tokens = rewards_BT.T, values_BT.T, trained_BT.T
    _, advantages_TB = jax.lax.scan(step, (bootstrap_B, jnp.zeros_like(bootstrap_B)), tokens, reverse=True)
    return TokenAdvantages(advantages_TB.T, jnp.where(trained_BT, advantages_TB.T + values_BT, 0))


def whiten(x_BT: Float[Array, "b t"], weights_BT: Float[Array, "b t"], *, eps: float = 1e-8) -> Float[Array, "b t"]:
    """`(x - mean) / sqrt(variance + eps)` over the trained tokens of a whole phase, 0 elsewhere; ddof 1.

    A single token gives 0. Source: Ziegler et al. 2019, section 2.2 (their code).
    """
    trained_BT = weights_BT != 0
    count = jnp.sum(trained_BT)
    mean = jnp.sum(jnp.where(trained_BT, x_BT, 0)) / jnp.maximum(count, 1)
    distance_BT = jnp.where(trained_BT, x_BT - mean, 0)
    variance = jnp.sum(distance_BT**2) / jnp.maximum(count - 1, 1)
    return distance_BT / jnp.sqrt(variance + eps)


def adapt_kl_weight(weight: float, kl: float, *, target: float, samples: int, horizon: int) -> float:
    """`k (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)`: the next phase's weight (Ziegler et al. 2019, eq. 3).

    Args:
        kl: mean over the samples of this phase of their summed divergence, in nats.
        samples: n, the samples of this phase.
    """
    return weight * (1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon)
