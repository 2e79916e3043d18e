"""The clipped policy gradient and its relatives, and divergence from a reference.

    l, l^o, l^r = log-probability of a token under the policy, under the policy that drew it, under the reference,
    all at the temperature of sampling         rho = exp(l - l^o)         A = advantage

Shapes: B samples, one a row; T length.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Divisor = Literal["sequence", "token", "constant"]
Ratio = Literal["token", "sequence"]
Clipping = Literal["ppo", "cispo"]
KLKind = Literal["k1", "k2", "k3", "unbiased"]
Correction = Literal["none", "truncate", "mask"]


def kl_estimate(
    logps_BT: Float[Array, "b t"], reference_BT: Float[Array, "b t"], *, kind: KLKind, old_BT: Array | None = None
) -> Float[Array, "b t"]:
    """An estimate of KL(policy || reference) at each token, x = l - l^r (Schulman 2020, "Approximating KL divergence").

    | kind | formula | its expected gradient as a term of the loss |
    |---|---|---|
    | k1 | x | 0: use it in the reward |
    | k2 | x^2 / 2 | that of KL(policy, reference) |
    | k3 | exp(-x) - 1 + x | that of KL(reference, policy) |
    | unbiased | rho k3 | that of KL(policy, reference) (DeepSeek-V3.2 2025, eq. 7) |

    Args:
        old_BT: l^o, for `unbiased`; none stands for the policy itself.
    """
    x_BT = logps_BT - reference_BT
    if kind == "k1":
        return x_BT
    if kind == "k2":
        return x_BT**2 / 2
    k3_BT = jnp.exp(-x_BT) - 1 + x_BT
    return k3_BT if kind == "k3" else jnp.exp(logps_BT - _old(logps_BT, old_BT)) * k3_BT


class PolicyLoss(NamedTuple):
    """Sums; divide `loss` by `weight`, and the others by `tokens` for means over trained tokens."""

    loss: Float[Array, ""]
    """What is minimised, under the divisor that was asked for."""
    weight: Float[Array, ""]
    """The divisor: samples, tokens, or samples times the longest completion allowed."""
    clipped: Float[Array, ""]
    """Tokens whose ratio lies where the clip binds."""
    kl_old: Float[Array, ""]
    """k3 estimate of KL(l^o || l): how far the policy went since it drew the tokens."""
    kl_reference: Float[Array, ""]
    """The term of the loss, 0 without a reference."""
    entropy: Float[Array, ""]
    tokens: Float[Array, ""]
    """Sum of the weights."""


def policy_loss(
    logps_BT: Float[Array, "b t"],
    old_BT: Float[Array, "b t"] | None,
    advantages_BT: Float[Array, "b t"],
    weights_BT: Float[Array, "b t"],
    reference_BT: Float[Array, "b t"] | None = None,
    entropy_BT: Float[Array, "b t"] | None = None,
    correction_BT: Float[Array, "b t"] | None = None,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float = 0.0,
    clipping: Clipping = "ppo",
    ratio: Ratio = "token",
    divisor: Divisor = "token",
    longest: int = 0,
    kl_kind: KLKind = "k3",
    kl_weight: float = 0.0,
    entropy_weight: float = 0.0,
) -> PolicyLoss:
    """Sums of a clipped policy gradient over the trained tokens; differentiable in `loss`.

    `ppo`: max(-rho A, -clip(rho, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7; a larger `high`: Yu et al. 2025,
    eq. 10); with dual clip c, never above -c A where A < 0 (Ye et al. 2020, eq. 5). `cispo`: -clip(rho) A l, the weight
    detached (MiniMax 2025, eq. 4). Ratio `sequence`: rho = exp(mean(l - l^o)) (Zheng et al. 2025, eq. 7).

    Divisors: `sequence`, the mean over samples of their mean over tokens (Shao et al. 2024, eq. 3); `token`, the mean
    over all tokens (Yu et al. 2025, eq. 12); `constant`, samples times `longest` (Liu, Z. et al. 2025, section 3.2). A
    sample without a trained token does not count.

    Args:
        old_BT: l^o; None where the policy has made no step since: rho is 1 and keeps its gradient.
        weights_BT: 1 for tokens that are trained, 0 for prompt, padding and what came after the end.
        reference_BT: l^r, of which `kl_weight` times `kl_kind` is added.
        correction_BT: a factor of every token, without a gradient: see `correction_weights`.
    """
    # What stands at other tokens may be anything, and 0 times an infinite gradient is not 0: so it is left out at once.
    trained_BT = weights_BT != 0
    logps_BT = jnp.where(trained_BT, logps_BT, 0)
    old_BT = jnp.where(trained_BT, _old(logps_BT, old_BT), 0)
    rho_BT = _ratios(logps_BT - old_BT, weights_BT, ratio)
    loss_BT = _clipped(rho_BT, logps_BT, advantages_BT, low, high, dual, clipping)
    if correction_BT is not None:
        loss_BT = loss_BT * jax.lax.stop_gradient(correction_BT)
    kl_BT = jnp.zeros_like(loss_BT)
    if reference_BT is not None:
        reference_BT = jnp.where(trained_BT, jax.lax.stop_gradient(reference_BT), 0)
        kl_BT = kl_estimate(logps_BT, reference_BT, kind=kl_kind, old_BT=old_BT)
        loss_BT = loss_BT + kl_weight * kl_BT
    entropy_BT = jnp.zeros_like(loss_BT) if entropy_BT is None else jnp.where(trained_BT, entropy_BT, 0)
    loss_BT = loss_BT - entropy_weight * entropy_BT
    # The clip binds on the side towards which the advantage pulls; the dual clip far out on the other.
    outside_BT = (rho_BT < 1 - low) | (rho_BT > dual) if dual else rho_BT < 1 - low
    outside_BT = jnp.where(advantages_BT > 0, rho_BT > 1 + high, (advantages_BT < 0) & outside_BT)
    kl_old_BT = kl_estimate(old_BT, logps_BT, kind="k3")
    loss, weight = _divided(loss_BT, weights_BT, divisor, longest)
    rest = (jnp.sum(x * weights_BT) for x in (outside_BT, kl_old_BT, kl_BT, entropy_BT, trained_BT))
    return PolicyLoss(loss, weight, *rest)


def _ratios(log_ratio_BT: Array, weights_BT: Array, ratio: Ratio) -> Float[Array, "b t"]:
    """rho of each token; of a sequence it is the geometric mean over its trained tokens (Zheng et al. 2025, eq. 7)."""
    if ratio == "token":
        return jnp.exp(log_ratio_BT)
    length_B1 = jnp.sum(weights_BT, axis=1, keepdims=True)
    mean_B1 = jnp.sum(log_ratio_BT * weights_BT, axis=1, keepdims=True) / jnp.maximum(length_B1, 1)
    return jnp.broadcast_to(jnp.exp(mean_B1), log_ratio_BT.shape)


def _clipped(
    rho_BT: Array, logps_BT: Array, advantages_BT: Array, low: float, high: float, dual: float, clipping: Clipping
) -> Float[Array, "b t"]:
    """The loss of each token before it is weighed."""
    inside_BT = jnp.clip(rho_BT, 1 - low, 1 + high)
    if clipping == "cispo":
        return -jax.lax.stop_gradient(inside_BT) * advantages_BT * logps_BT
    loss_BT = jnp.maximum(-rho_BT * advantages_BT, -inside_BT * advantages_BT)
    if dual:
        loss_BT = jnp.where(advantages_BT < 0, jnp.minimum(loss_BT, -dual * advantages_BT), loss_BT)
    return loss_BT


def _divided(
    loss_BT: Array, weights_BT: Array, divisor: Divisor, longest: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the losses and what it is to be divided by; both add up over microbatches."""
    total_B = jnp.sum(loss_BT * weights_BT, axis=1)
    length_B = jnp.sum(weights_BT, axis=1)
    samples = jnp.sum(length_B > 0, dtype=loss_BT.dtype)
    if divisor == "sequence":
        return jnp.sum(total_B / jnp.where(length_B > 0, length_B, 1)), samples
    return jnp.sum(total_B), jnp.sum(length_B) if divisor == "token" else samples * longest


def mismatch(
    trainer_BT: Float[Array, "b t"], sampler_BT: Float[Array, "b t"], weights_BT: Float[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over the trained tokens of |d| and of the k3 estimate of KL(sampler || trainer), d = trainer - sampler.

    Both are 0 where the program that draws computes what the trainer does.
    """
    d_BT = jnp.where(weights_BT != 0, trainer_BT - sampler_BT, 0)
    return jnp.sum(jnp.abs(d_BT) * weights_BT), jnp.sum((jnp.exp(d_BT) - 1 - d_BT) * weights_BT)


def correction_weights(
    trainer_BT: Float[Array, "b t"],
    sampler_BT: Float[Array, "b t"],
    weights_BT: Float[Array, "b t"],
    *,
    correction: Correction,
    level: Ratio = "token",
    cap: float = 2.0,
) -> Float[Array, "b t"]:
    """Factors for tokens whose sampler gave other log-probabilities than the trainer; w = exp(trainer - sampler).

    `truncate`: min(w, cap) (Yao et al. 2025); `mask`: w, but 0 above the cap (Liu, J. et al. 2025); `none`: 1. The
    level `sequence` takes the product of w over the tokens of a sample.
    """
    if correction == "none":
        return jnp.ones_like(trainer_BT)
    log_w_BT = jnp.where(weights_BT != 0, trainer_BT - sampler_BT, 0)
    if level == "sequence":
        log_w_BT = jnp.broadcast_to(jnp.sum(log_w_BT, axis=1, keepdims=True), log_w_BT.shape)
    w_BT = jnp.exp(log_w_BT)
    return jnp.minimum(w_BT, cap) if correction == "truncate" else jnp.where(w_BT > cap, 0, w_BT)


def _old(logps_BT: Array, old_BT: Array | None) -> Array:
    """l^o without a gradient."""
    return jax.lax.stop_gradient(logps_BT if old_BT is None else old_BT)
