"""Log-probabilities of given tokens and the entropy at each, computed block by block; and their sums over segments.

A loss of preference or reinforcement learning sends any gradient back to any token, so unlike in `lm_loss` none is
known in the forward pass. The backward pass makes the logits of each block again: four matrix products in all.

Shapes: B batch, T length, D width, V vocabulary, C tokens of a row in one block, M segments of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.numerics import wide, wide_matmul
from torch_ref.objectives.blocks import block_count, join, split


class TokenLogps(NamedTuple):
    """The log-probability of each target and the entropy there, in nats, float32 or wider."""

    logps: Float[Tensor, "b t"]
    """Log-probability of the target."""
    entropy: Float[Tensor, "b t"]
    """Entropy of the distribution that the target was drawn from."""


def token_logps(
    hidden_BTD: Float[Tensor, "b t d"],
    kernel_DV: Float[Tensor, "d v"],
    bias_V: Float[Tensor, " v"] | None,
    targets_BT: Int[Tensor, "b t"],
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
    bias_V = hidden_BTD.new_zeros(kernel_DV.shape[1], dtype=wide(hidden_BTD.dtype)) if bias_V is None else bias_V
    blocks = block_count(targets_BT.shape, block)
    return TokenLogps(*_Blockwise.apply(hidden_BTD, kernel_DV, bias_V, targets_BT.long(), temperature, blocks))


class _Blockwise(torch.autograd.Function):
    """Log-probabilities and entropies; keeps the inputs and two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        kernel_DV: Tensor,
        bias_V: Tensor,
        targets_BT: Tensor,
        temperature: float,
        blocks: int,
    ) -> tuple[Tensor, Tensor]:
        pieces = []
        for hidden_BCD, targets_BC in split((hidden_BTD, targets_BT), blocks):
            x_BCV = _logits(hidden_BCD, kernel_DV, bias_V, temperature)
            partition_BC1 = torch.logsumexp(x_BCV, dim=-1, keepdim=True)
            target_BC = x_BCV.gather(-1, targets_BC[..., None])[..., 0]
            entropy_BC = -(torch.exp(x_BCV - partition_BC1) * (x_BCV - partition_BC1)).sum(dim=-1)
            pieces.append((target_BC - partition_BC1[..., 0], entropy_BC, partition_BC1[..., 0]))
        logps_BT, entropy_BT, partition_BT = (join(piece) for piece in zip(*pieces, strict=True))
        ctx.options = temperature, blocks
        ctx.save_for_backward(hidden_BTD, kernel_DV, bias_V, targets_BT, entropy_BT, partition_BT)
        return logps_BT, entropy_BT

    @staticmethod
    def backward(ctx: Any, dlogps_BT: Tensor, dentropy_BT: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_BTD, kernel_DV, bias_V, targets_BT, entropy_BT, partition_BT = ctx.saved_tensors
        temperature, blocks = ctx.options
        dkernel_DV, dbias_V = (torch.zeros_like(x, dtype=wide(hidden_BTD.dtype)) for x in (kernel_DV, bias_V))
        dhidden = []
        pieces = split((hidden_BTD, targets_BT, entropy_BT, partition_BT, dlogps_BT, dentropy_BT), blocks)
        for hidden_BCD, targets_BC, entropy_BC, partition_BC, dlogps_BC, dentropy_BC in pieces:
            logp_BCV = _logits(hidden_BCD, kernel_DV, bias_V, temperature) - partition_BC[..., None]
            # d logp / d x = onehot - p;  d entropy / d x = -p (log p + entropy)
            factor_BCV = dlogps_BC[..., None] + dentropy_BC[..., None] * (logp_BCV + entropy_BC[..., None])
            dx_BCV = -torch.exp(logp_BCV) * factor_BCV
            dx_BCV = dx_BCV.scatter_add(-1, targets_BC[..., None], dlogps_BC[..., None]) / temperature
            dbias_V = dbias_V + dx_BCV.sum(dim=(0, 1))
            # The products run in the dtype of the hidden states, as those of the forward pass; sums are wide.
            dx_BCV = dx_BCV.to(hidden_BTD.dtype)
            dhidden.append((dx_BCV @ kernel_DV.T).to(hidden_BTD.dtype))
            dkernel_DV = dkernel_DV + wide_matmul(hidden_BCD.flatten(0, 1).T, dx_BCV.flatten(0, 1))
        return join(dhidden), dkernel_DV.to(kernel_DV.dtype), dbias_V.to(bias_V.dtype), None, None, None


def _logits(
    hidden_BCD: Float[Tensor, "b c d"], kernel_DV: Float[Tensor, "d v"], bias_V: Float[Tensor, " v"], temperature: float
) -> Float[Tensor, "b c v"]:
    """The logits of a block over the temperature, float32 or wider."""
    return (wide_matmul(hidden_BCD, kernel_DV) + bias_V) / temperature


def segment_sums(
    x_BT: Float[Tensor, "b t"], weights_BT: Float[Tensor, "b t"], segments_BT: Int[Tensor, "b t"], segments: int
) -> Float[Tensor, "b m"]:
    """Weighted sums of `x` over the tokens of each segment 1 to `segments`; 0 for one that the row does not have.

    What stands where the weight is 0 is of no account, not even when it is infinite.
    """
    x_BT = torch.where(weights_BT != 0, x_BT * weights_BT, 0)
    numbers_M = torch.arange(1, segments + 1, device=segments_BT.device)
    return torch.where(segments_BT[..., None] == numbers_M, x_BT[..., None], 0).sum(dim=1)
