"""Next-token cross-entropy, computed block by block so that full float32 logits never exist.

The gradient of a block is known as soon as its logits are, so the forward pass keeps the gradients of the hidden states
and of the output matrix, and the backward pass only scales them: three matrix products, none repeated.

Shapes: B batch, T length, D width, V vocabulary, C tokens of a row in one block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.numerics import wide, wide_matmul
from torch_ref.objectives.blocks import block_count, join, split


class LMLoss(NamedTuple):
    """Sums over the targets, each times its weight: 0 where it does not count, such as padding. Divide by `weight` for
    means. Nats."""

    loss: Float[Tensor, ""]
    """What is minimised: smoothed cross-entropy plus z-loss."""
    nll: Float[Tensor, ""]
    """Plain negative log-likelihood."""
    correct: Float[Tensor, ""]
    """How often the likeliest token was the target."""
    weight: Float[Tensor, ""]
    """Sum of the weights."""


def lm_loss(
    hidden_BTD: Float[Tensor, "b t d"],
    kernel_DV: Float[Tensor, "d v"],
    bias_V: Float[Tensor, " v"] | None,
    targets_BT: Int[Tensor, "b t"],
    weights_BT: Float[Tensor, "b t"],
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
    bias_V = hidden_BTD.new_zeros(kernel_DV.shape[1], dtype=width) if bias_V is None else bias_V
    blocks = block_count(targets_BT.shape, block)
    inputs = (hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT, z_loss, label_smoothing, blocks)
    if torch.is_grad_enabled():
        return LMLoss(*_Blockwise.apply(*inputs))
    return LMLoss(*_forward(*inputs, gradients=False)[0])


class _Blockwise(torch.autograd.Function):
    """The sums, with the gradient that the forward pass has already computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        sums, gradients = _forward(*inputs, gradients=True)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, scale: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *(gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors), *(None,) * 5


def _forward(
    hidden: Tensor,
    kernel: Tensor,
    bias: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    label_smoothing: float,
    blocks: int,
    *,
    gradients: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The four sums, and the gradients of the first with respect to hidden, kernel and bias."""
    width = wide(hidden.dtype)
    sums = [hidden.new_zeros((), dtype=width)] * 4
    dkernel, dbias, dhidden = torch.zeros_like(kernel, dtype=width), torch.zeros_like(bias, dtype=width), []
    for hidden_BCD, targets_BC, weights_BC in split((hidden, targets.long(), weights.to(width)), blocks):
        (logits, partition), terms = _block_terms(
            kernel, bias, z_loss, label_smoothing, hidden_BCD, targets_BC, weights_BC
        )
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
        if not gradients:
            continue
        # d loss / d logits = (1 + 2 z_loss z) softmax - (1 - s) onehot - s / V
        dlogits = torch.exp(logits - partition) * (1 + 2 * z_loss * partition) - label_smoothing / logits.shape[-1]
        dlogits.scatter_add_(-1, targets_BC[..., None], torch.full_like(partition, label_smoothing - 1))
        dlogits = dlogits * weights_BC[..., None]
        dbias = dbias + dlogits.sum(dim=(0, 1))
        dlogits = dlogits.to(hidden.dtype)
        dhidden.append((dlogits @ kernel.T).to(hidden.dtype))
        dkernel = dkernel + wide_matmul(hidden_BCD.flatten(0, 1).T, dlogits.flatten(0, 1))
    if not gradients:
        return tuple(sums), ()
    return tuple(sums), (join(dhidden), dkernel.to(kernel.dtype), dbias.to(bias.dtype))


def _block_terms(
    kernel_DV: Tensor,
    bias_V: Tensor,
    z_loss: float,
    label_smoothing: float,
    hidden_BCD: Tensor,
    targets_BC: Tensor,
    weights_BC: Tensor,
) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Logits and log-partition of one block, and its sums (loss, nll, correct, weight)."""
    logits_BCV = wide_matmul(hidden_BCD, kernel_DV) + bias_V
    partition_BC1 = torch.logsumexp(logits_BCV, dim=-1, keepdim=True)
    partition_BC = partition_BC1[..., 0]
    nll_BC = partition_BC - logits_BCV.gather(-1, targets_BC[..., None])[..., 0]
    smooth_BC = partition_BC - logits_BCV.mean(dim=-1)
    loss_BC = (1 - label_smoothing) * nll_BC + label_smoothing * smooth_BC + z_loss * partition_BC**2
    correct_BC = logits_BCV.argmax(dim=-1) == targets_BC
    terms = [torch.sum(term * weights_BC) for term in (loss_BC, nll_BC, correct_BC)]
    return (logits_BCV, partition_BC1), [*terms, weights_BC.sum()]
