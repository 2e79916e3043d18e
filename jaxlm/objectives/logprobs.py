"""Log-probabilities of given tokens and the entropy at each, computed block by block; and their sums over segments.

A loss of preference or reinforcement learning sends any gradient back to any token, so unlike in `lm_loss` none is
known in the forward pass. The backward pass makes the logits of each block again: four matrix products in all.

Shapes: B batch, T length, D width, V vocabulary, C tokens of a row in one block, M segments of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.objectives.blocks import block_count, join, split
from jaxlm.typed_jax import broadcasted_iota, custom_vjp, einsum


class TokenLogps(NamedTuple):
    """The log-probability of each target and the entropy there, in nats, float32 or wider."""

    logps: Float[Array, "b t"]
    """Log-probability of the target."""
    entropy: Float[Array, "b t"]
    """Entropy of the distribution that the target was drawn from."""


def token_logps(
    hidden_BTD: Float[Array, "b t d"],
    kernel_DV: Float[Array, "d v"],
    bias_V: Float[Array, " v"] | None,
    targets_BT: Int[Array, "b t"],
    *,
    temperature: float = 1.0,
    block: int = 1024,
) -> TokenLogps:
    """Log-probability and entropy under `softmax(logits / temperature)`; differentiable in hidden, kernel and bias.

    `logps = x[target] - z` and `entropy = z - sum(p x)` with `x = logits / temperature`, `z = logsumexp(x)`,
    `p = exp(x - z)`. Padding gets numbers too: the caller weighs them by 0.

    Args:
        temperature: of the distribution from which the tokens were drawn; it divides the logits.
        block: tokens whose logits exist at one time.
    """
    bias_V = jnp.zeros(kernel_DV.shape[1], wide(hidden_BTD.dtype)) if bias_V is None else bias_V
    blocks = block_count(targets_BT.shape, block)
    return _blockwise(hidden_BTD, kernel_DV, bias_V, targets_BT, temperature, blocks)


Kept = tuple[Array, Array, Array, Array, Array, Array]
"""Hidden states, kernel, bias and targets, and of each token its entropy and log-partition."""
Piece = tuple[Array, Array, Array, Array, Array, Array]
"""Hidden states, targets, entropy and log-partition of a block, and the gradients of its two results."""


@custom_vjp(4, 5)
def _blockwise(
    hidden_BTD: Float[Array, "b t d"],
    kernel_DV: Float[Array, "d v"],
    bias_V: Float[Array, " v"],
    targets_BT: Int[Array, "b t"],
    temperature: float,
    blocks: int,
) -> TokenLogps:
    return _forward(hidden_BTD, kernel_DV, bias_V, targets_BT, temperature, blocks)[0]


def _forward(
    hidden_BTD: Array, kernel_DV: Array, bias_V: Array, targets_BT: Array, temperature: float, blocks: int
) -> tuple[TokenLogps, Kept]:
    """Log-probabilities and entropies, and what the backward pass keeps: the inputs and two numbers a token."""

    def body(_: None, piece: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        hidden_BCD, targets_BC = piece
        x_BCV = _logits(hidden_BCD, kernel_DV, bias_V, temperature)
        partition_BC1 = jax.nn.logsumexp(x_BCV, axis=-1, keepdims=True)
        target_BC = jnp.take_along_axis(x_BCV, targets_BC[..., None], axis=-1)[..., 0]
        entropy_BC = -jnp.sum(jnp.exp(x_BCV - partition_BC1) * (x_BCV - partition_BC1), axis=-1)
        return None, (target_BC - partition_BC1[..., 0], entropy_BC, partition_BC1[..., 0])

    _, pieces = jax.lax.scan(body, None, split((hidden_BTD, targets_BT), blocks))
    logps_BT, entropy_BT, partition_BT = join(pieces)
    return TokenLogps(logps_BT, entropy_BT), (hidden_BTD, kernel_DV, bias_V, targets_BT, entropy_BT, partition_BT)


def _backward(temperature: float, blocks: int, kept: Kept, cotangents: TokenLogps) -> tuple[Array, Array, Array, None]:
    hidden_BTD, kernel_DV, bias_V, targets_BT, entropy_BT, partition_BT = kept
    width = wide(hidden_BTD.dtype)

    def body(sums: tuple[Array, Array], piece: Piece) -> tuple[tuple[Array, Array], Array]:
        dkernel_DV, dbias_V = sums
        hidden_BCD, targets_BC, entropy_BC, partition_BC, dlogps_BC, dentropy_BC = piece
        logp_BCV = _logits(hidden_BCD, kernel_DV, bias_V, temperature) - partition_BC[..., None]
        # d logp / d x = onehot - p;  d entropy / d x = -p (log p + entropy)
        factor_BCV = dlogps_BC[..., None] + dentropy_BC[..., None] * (logp_BCV + entropy_BC[..., None])
        target_BCV = broadcasted_iota(targets_BC.dtype, logp_BCV.shape, 2) == targets_BC[..., None]
        dx_BCV = jnp.where(target_BCV, dlogps_BC[..., None], 0) - jnp.exp(logp_BCV) * factor_BCV
        dx_BCV = dx_BCV / temperature
        dbias_V = dbias_V + jnp.sum(dx_BCV, axis=(0, 1))
        # The products run in the dtype of the hidden states, as those of the forward pass; sums over tokens are wide.
        dx_BCV = dx_BCV.astype(hidden_BTD.dtype)
        dhidden_BCD = einsum("bcv,dv->bcd", dx_BCV, kernel_DV).astype(hidden_BTD.dtype)
        product_DV = einsum("bcd,bcv->dv", hidden_BCD, dx_BCV, preferred_element_type=width)
        return (dkernel_DV + product_DV, dbias_V), dhidden_BCD

    zeros = jnp.zeros(kernel_DV.shape, width), jnp.zeros(bias_V.shape, width)
    pieces = split((hidden_BTD, targets_BT, entropy_BT, partition_BT, cotangents.logps, cotangents.entropy), blocks)
    (dkernel_DV, dbias_V), dhidden = jax.lax.scan(body, zeros, pieces)
    return join(dhidden), dkernel_DV.astype(kernel_DV.dtype), dbias_V.astype(bias_V.dtype), None


_blockwise.defvjp(_forward, _backward)


def _logits(
    hidden_BCD: Float[Array, "b c d"], kernel_DV: Float[Array, "d v"], bias_V: Float[Array, " v"], temperature: float
) -> Float[Array, "b c v"]:
    """The logits of a block over the temperature, float32 or wider."""
    product_BCV = einsum("bcd,dv->bcv", hidden_BCD, kernel_DV, preferred_element_type=wide(hidden_BCD.dtype))
    return (product_BCV + bias_V) / temperature


def segment_sums(
    x_BT: Float[Array, "b t"], weights_BT: Float[Array, "b t"], segments_BT: Int[Array, "b t"], segments: int
) -> Float[Array, "b m"]:
    """Weighted sums of `x` over the tokens of each segment 1 to `segments`; 0 for one that the row does not have.

    What stands where the weight is 0 is of no account, not even when it is infinite.
    """
    x_BT = jnp.where(weights_BT != 0, x_BT * weights_BT, 0)
    member_BTM = segments_BT[..., None] == jnp.arange(1, segments + 1)
    return jnp.sum(jnp.where(member_BTM, x_BT[..., None], 0), axis=1)
