"""Next-token cross-entropy, computed block by block so that full float32 logits never exist.

The gradient of a block is known as soon as its logits are, so the forward pass keeps the gradients of the hidden states
and of the output matrix, and the backward pass only scales them: three matrix products, none repeated.

Shapes: B batch, T length, D width, V vocabulary, C tokens of a row in one block.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.objectives.blocks import block_count, join, split
from jaxlm.typed_jax import broadcasted_iota, custom_vjp, einsum, tree_map


class LMLoss(NamedTuple):
    """Sums over the targets, each times its weight: 0 where it does not count, such as padding. Divide by `weight` for
    means. Nats."""

    loss: Float[Array, ""]
    """What is minimised: smoothed cross-entropy plus z-loss."""
    nll: Float[Array, ""]
    """Plain negative log-likelihood."""
    correct: Float[Array, ""]
    """How often the likeliest token was the target."""
    weight: Float[Array, ""]
    """Sum of the weights."""


def lm_loss(
    hidden_BTD: Float[Array, "b t d"],
    kernel_DV: Float[Array, "d v"],
    bias_V: Float[Array, " v"] | None,
    targets_BT: Int[Array, "b t"],
    weights_BT: Float[Array, "b t"],
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    block: int = 1024,
) -> LMLoss:
    """Weighted sums of the next-token loss and its companions; differentiable in `loss` only.

    With log-partition `z = logsumexp(logits)`: `nll = z - logits[target]`, and
    `loss = (1 - s) nll + s (z - mean(logits)) + z_loss z^2` for smoothing s (Szegedy et al. 2016, section 7; z-loss:
    Chowdhery et al. 2022, section 5). Logits and loss are float32 or wider.

    Args:
        block: tokens whose logits exist at one time.
    """
    width = wide(hidden_BTD.dtype)
    bias_V = jnp.zeros(kernel_DV.shape[1], width) if bias_V is None else bias_V
    blocks = block_count(targets_BT.shape, block)
    return _blockwise(hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT, z_loss, label_smoothing, blocks)


Rows = tuple[Array, Array, Array]
"""Hidden states [B, T, D], targets and weights [B, T]; or those of a block."""
Slopes = tuple[Array, Array, Array]
"""Gradients with respect to hidden states, kernel and bias."""


@custom_vjp(5, 6, 7)
def _blockwise(
    hidden_BTD: Array,
    kernel_DV: Array,
    bias_V: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    label_smoothing: float,
    blocks: int,
) -> LMLoss:
    """The sums, without a gradient."""

    def body(sums: LMLoss, rows: Rows) -> tuple[LMLoss, None]:
        _, terms = _block_terms(kernel_DV, bias_V, z_loss, label_smoothing, *rows)
        return tree_map(jnp.add, sums, terms), None

    sums, _ = jax.lax.scan(body, _zeros(hidden_BTD), split((hidden_BTD, targets_BT, weights_BT), blocks))
    return sums


def _forward(
    hidden_BTD: Array,
    kernel_DV: Array,
    bias_V: Array,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    label_smoothing: float,
    blocks: int,
) -> tuple[LMLoss, Slopes]:
    """The sums, and the gradients of the loss with respect to hidden states, kernel and bias."""
    width = wide(hidden_BTD.dtype)

    def body(carry: tuple[LMLoss, Array, Array], rows: Rows) -> tuple[tuple[LMLoss, Array, Array], Array]:
        sums, dkernel_DV, dbias_V = carry
        (logits_BCV, partition_BC1), terms = _block_terms(kernel_DV, bias_V, z_loss, label_smoothing, *rows)
        hidden_BCD, targets_BC, weights_BC = rows
        # d loss / d logits = (1 + 2 z_loss z) softmax - (1 - s) onehot - s / V
        softmax_BCV = jnp.exp(logits_BCV - partition_BC1)
        dlogits_BCV = softmax_BCV * (1 + 2 * z_loss * partition_BC1) - label_smoothing / logits_BCV.shape[-1]
        target_BCV = broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2) == targets_BC[..., None]
        dlogits_BCV = (dlogits_BCV - jnp.where(target_BCV, 1 - label_smoothing, 0)) * weights_BC[..., None]
        dbias_V = dbias_V + jnp.sum(dlogits_BCV, axis=(0, 1))
        # The products run in the dtype of the hidden states, as those of the forward pass; sums over tokens are wide.
        dlogits_BCV = dlogits_BCV.astype(hidden_BTD.dtype)
        dhidden_BCD = einsum("bcv,dv->bcd", dlogits_BCV, kernel_DV)
        dkernel_DV = dkernel_DV + einsum("bcd,bcv->dv", hidden_BCD, dlogits_BCV, preferred_element_type=width)
        return (tree_map(jnp.add, sums, terms), dkernel_DV, dbias_V), dhidden_BCD

    start = (_zeros(hidden_BTD), jnp.zeros(kernel_DV.shape, width), jnp.zeros(bias_V.shape, width))
    rows = split((hidden_BTD, targets_BT, weights_BT), blocks)
    (sums, dkernel_DV, dbias_V), dhidden = jax.lax.scan(body, start, rows)
    return sums, (join(dhidden), dkernel_DV.astype(kernel_DV.dtype), dbias_V.astype(bias_V.dtype))


def _backward(
    z_loss: float, label_smoothing: float, blocks: int, slopes: Slopes, cotangents: LMLoss
) -> tuple[Array, Array, Array, None, None]:
    def scaled(slope: Array) -> Array:
        return slope * cotangents.loss.astype(slope.dtype)

    return *tree_map(scaled, slopes), None, None


_blockwise.defvjp(_forward, _backward)


def _zeros(hidden_BTD: Array) -> LMLoss:
    """Sums over no token."""
    zero = jnp.zeros((), wide(hidden_BTD.dtype))
    return LMLoss(zero, zero, zero, zero)


def _block_terms(
    kernel_DV: Array,
    bias_V: Array,
    z_loss: float,
    label_smoothing: float,
    hidden_BCD: Array,
    targets_BC: Array,
    weights_BC: Array,
) -> tuple[tuple[Array, Array], LMLoss]:
    """Logits and log-partition of one block, and its sums."""
    width = wide(hidden_BCD.dtype)
    weights_BC = weights_BC.astype(width)
    logits_BCV = einsum("bcd,dv->bcv", hidden_BCD, kernel_DV, preferred_element_type=width) + bias_V
    partition_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    partition_BC = partition_BC1[..., 0]
    nll_BC = partition_BC - jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    loss_BC = nll_BC + z_loss * partition_BC**2
    if label_smoothing:
        smooth_BC = partition_BC - jnp.mean(logits_BCV, axis=-1)
        loss_BC = loss_BC + label_smoothing * (smooth_BC - nll_BC)
    correct_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
    loss, nll, correct = (jnp.sum(term_BC * weights_BC) for term_BC in (loss_BC, nll_BC, correct_BC))
    return (logits_BCV, partition_BC1), LMLoss(loss, nll, correct, jnp.sum(weights_BC))
