"""Next-token cross-entropy, computed block by block so that full float32 logits never exist.

The gradient of a block is known as soon as its logits are, so the forward pass keeps the gradients of the hidden states
and of the output matrix, and the backward pass only scales them: three matrix products, none repeated.

Shapes: B batch, T length, D width, V vocabulary, C tokens of a row in one block.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.objectives.blocks import block_count, join, split


class LMLoss(NamedTuple):
    """Sums over the weighted targets; divide by `weight` for means. Nats."""

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
    sums: Any = _blockwise(hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT, z_loss, label_smoothing, blocks)
    return LMLoss(*sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blockwise(hidden, kernel, bias, targets, weights, z_loss, label_smoothing, blocks):
    def body(sums, part):
        _, terms = _block_terms(kernel, bias, z_loss, label_smoothing, *part)
        return jax.tree.map(jnp.add, sums, terms), None

    zero = jnp.zeros((), wide(hidden.dtype))
    sums, _ = jax.lax.scan(body, (zero,) * 4, split((hidden, targets, weights), blocks))
    return sums


def _forward(hidden, kernel, bias, targets, weights, z_loss, label_smoothing, blocks):
    width = wide(hidden.dtype)

    def body(carry, part):
        sums, dkernel, dbias = carry
        (logits, partition), terms = _block_terms(kernel, bias, z_loss, label_smoothing, *part)
        hidden_BCD, targets_BC, weights_BC = part
        # d loss / d logits = (1 + 2 z_loss z) softmax - (1 - s) onehot - s / V
        dlogits = jnp.exp(logits - partition) * (1 + 2 * z_loss * partition) - label_smoothing / logits.shape[-1]
        target = jax.lax.broadcasted_iota(targets_BC.dtype, logits.shape, 2) == targets_BC[..., None]
        dlogits = (dlogits - jnp.where(target, 1 - label_smoothing, 0)) * weights_BC[..., None]
        dbias = dbias + jnp.sum(dlogits, axis=(0, 1))
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = jnp.einsum("bcv,dv->bcd", dlogits, kernel)
        dkernel = dkernel + jnp.einsum("bcd,bcv->dv", hidden_BCD, dlogits, preferred_element_type=width)
        return (jax.tree.map(jnp.add, sums, terms), dkernel, dbias), dhidden

    zero = jnp.zeros((), width)
    start = ((zero,) * 4, jnp.zeros(kernel.shape, width), jnp.zeros(bias.shape, width))
    (sums, dkernel, dbias), dhidden = jax.lax.scan(body, start, split((hidden, targets, weights), blocks))
    return sums, (join(dhidden), dkernel.astype(kernel.dtype), dbias.astype(bias.dtype))


def _backward(z_loss, label_smoothing, blocks, residuals, cotangents):
    scale = cotangents[0]
    dhidden, dkernel, dbias = jax.tree.map(lambda g: g * scale.astype(g.dtype), residuals)
    return dhidden, dkernel, dbias, None, None


_blockwise.defvjp(_forward, _backward)


def _block_terms(kernel_DV, bias_V, z_loss, label_smoothing, hidden_BCD, targets_BC, weights_BC):
    """Logits and log-partition of one block, and its sums (loss, nll, correct, weight)."""
    width = wide(hidden_BCD.dtype)
    weights_BC = weights_BC.astype(width)
    logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, kernel_DV, preferred_element_type=width) + bias_V
    partition_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
    partition_BC = partition_BC1[..., 0]
    nll_BC = partition_BC - jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    loss_BC = nll_BC + z_loss * partition_BC**2
    if label_smoothing:
        smooth_BC = partition_BC - jnp.mean(logits_BCV, axis=-1)
        loss_BC = loss_BC + label_smoothing * (smooth_BC - nll_BC)
    correct_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
    terms = [jnp.sum(term * weights_BC) for term in (loss_BC, nll_BC, correct_BC)]
    return (logits_BCV, partition_BC1), (*terms, jnp.sum(weights_BC))
