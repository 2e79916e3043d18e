"""Losses that teach a student what a teacher thinks of every token, computed block by block.

    p, q = distributions of student and teacher at temperature tau        w = weight of a token
    loss = a * nll + (1 - a) * tau^2 * D        a is the weight of the hard term: the target itself, at temperature 1

`states_loss` compares hidden states instead: D is a mean square distance, without a temperature.

As in `lm_loss`, the gradient of a block is known as soon as its logits are: the forward pass keeps it. No [B, T, V] of
either model exists. Everything is shifted once, in the data.

Shapes: B batch, T length, D width of the student, E of the teacher, V vocabulary, C tokens of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.numerics import wide, wide_matmul
from torch_ref.objectives.blocks import block_count, join, split
from torch_ref.objectives.lm import lm_loss
from torch_ref.objectives.teacher import LikeliestTokens, Teacher, divergence, outcomes, wide_logits

Options = tuple[float, float, float, int]
"""beta, hard_weight, temperature, number of blocks."""


class DistillLoss(NamedTuple):
    """Sums over the weighted tokens; divide by `weight` for means. Nats."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    nll: Float[Tensor, ""]
    """Negative log-likelihood of the targets."""
    divergence: Float[Tensor, ""]
    """D, before tau^2."""
    correct: Float[Tensor, ""]
    """How often the student's likeliest token was the target."""
    weight: Float[Tensor, ""]


def distill_loss(
    hidden_BTD: Float[Tensor, "b t d"],
    kernel_DV: Float[Tensor, "d v"],
    bias_V: Float[Tensor, " v"] | None,
    teacher: Teacher | LikeliestTokens,
    targets_BT: Int[Tensor, "b t"],
    weights_BT: Float[Tensor, "b t"],
    *,
    beta: float = 0.0,
    hard_weight: float = 0.5,
    temperature: float = 1.0,
    block: int = 1024,
) -> DistillLoss:
    """Weighted sums of `a * nll + (1 - a) * tau^2 * D`; differentiable in `loss`, by the student only.

    D is the generalised Jensen-Shannon divergence (Agarwal et al. 2024, eq. 1) with `m = b q + (1 - b) p`:
    `b KL(q || m) + (1 - b) KL(p || m)`; 0 stands for the forward KL(q || p) (Hinton et al. 2015) and 1 for the
    reverse KL(p || q), as in TRL. Of likeliest tokens, D is that of K + 1 outcomes: never above the full one, and equal
    to it where K = V.

    Args:
        beta: b.
        hard_weight: a.
        temperature: tau, which divides the logits of both.
        block: tokens whose logits exist at one time.
    """
    width = wide(hidden_BTD.dtype)
    bias_V = hidden_BTD.new_zeros(kernel_DV.shape[1], dtype=width) if bias_V is None else bias_V
    options = (beta, hard_weight, temperature, block_count(targets_BT.shape, block))
    inputs = (hidden_BTD, kernel_DV, bias_V, teacher, targets_BT.long(), weights_BT.to(width), options)
    if torch.is_grad_enabled():
        return DistillLoss(*_Blockwise.apply(*inputs))
    return DistillLoss(*_forward(*inputs, gradients=False)[0])


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
        return *(gradient * scale.to(gradient.dtype) for gradient in ctx.saved_tensors), *(None,) * 4


def _forward(
    hidden_BTD: Tensor,
    kernel_DV: Tensor,
    bias_V: Tensor,
    teacher: Teacher | LikeliestTokens,
    targets_BT: Tensor,
    weights_BT: Tensor,
    options: Options,
    *,
    gradients: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sums, and the gradients of the first with respect to hidden, kernel and bias."""
    moving, output = _parts(teacher)
    sums = [weights_BT.new_zeros(())] * 5
    dkernel_DV, dbias_V = (torch.zeros_like(x, dtype=weights_BT.dtype) for x in (kernel_DV, bias_V))
    dhidden = []
    for hidden_BCD, targets_BC, weights_BC, *taught in split(
        (hidden_BTD, targets_BT, weights_BT, *moving), options[-1]
    ):
        student = [x.detach().requires_grad_(gradients) for x in (hidden_BCD, kernel_DV, bias_V)]
        with torch.set_grad_enabled(gradients):
            terms = _block_sums(student, output, options, taught, targets_BC, weights_BC)
        sums = [total + term.detach() for total, term in zip(sums, terms, strict=True)]
        if gradients:
            slopes = torch.autograd.grad(terms[0], student)
            dhidden.append(slopes[0])
            dkernel_DV, dbias_V = dkernel_DV + slopes[1], dbias_V + slopes[2]
    if not gradients:
        return tuple(sums), ()
    return tuple(sums), (join(dhidden), dkernel_DV.to(kernel_DV.dtype), dbias_V.to(bias_V.dtype))


def _parts(teacher: Teacher | LikeliestTokens) -> tuple[tuple[Tensor, ...], Any]:
    """What is cut into blocks along T, and what every block needs."""
    return (teacher[:1], teacher[1:]) if isinstance(teacher, Teacher) else (tuple(teacher), None)


def _block_sums(
    student: list[Tensor], output: Any, options: Options, teacher: list[Tensor], targets_BC: Tensor, weights_BC: Tensor
) -> tuple[Tensor, ...]:
    """Loss, nll, divergence, correct and weight of a block."""
    beta, hard_weight, temperature, _ = options
    logits_BCV = wide_logits(*student)
    logp_BCV = torch.log_softmax(logits_BCV / temperature, dim=-1)
    if output is None:
        logp_BCV, teacher_logps = outcomes(logp_BCV, *teacher)
    else:
        teacher_logps = torch.log_softmax(wide_logits(*teacher, *output) / temperature, dim=-1)
    divergence_BC = divergence(logp_BCV, teacher_logps.detach(), beta)
    nll_BC = torch.logsumexp(logits_BCV, dim=-1) - logits_BCV.gather(-1, targets_BC[..., None])[..., 0]
    loss_BC = hard_weight * nll_BC + (1 - hard_weight) * temperature**2 * divergence_BC
    correct_BC = (logits_BCV.argmax(dim=-1) == targets_BC).to(loss_BC.dtype)
    terms = loss_BC, nll_BC, divergence_BC, correct_BC
    return *(torch.sum(x * weights_BC) for x in terms), weights_BC.sum()


def hidden_loss(
    student_BTD: Float[Tensor, "b t d"],
    teacher_BTE: Float[Tensor, "b t e"],
    projection_DE: Float[Tensor, "d e"],
    weights_BT: Float[Tensor, "b t"],
) -> Float[Tensor, ""]:
    """Weighted sum over tokens of the mean square distance after a learned projection (Jiao et al. 2020, eq. 8)."""
    width = wide(student_BTD.dtype)
    distance_BTE = wide_matmul(student_BTD, projection_DE) - teacher_BTE.detach().to(width)
    return torch.sum(torch.mean(distance_BTE**2, dim=-1) * weights_BT)


class States(NamedTuple):
    """Outputs of a layer of the student and of one of the teacher, and the map by which they are compared."""

    student_BTD: Float[Tensor, "b t d"]
    teacher_BTE: Float[Tensor, "b t e"]
    projection_DE: Float[Tensor, "d e"]


def states_loss(
    hidden_BTD: Float[Tensor, "b t d"],
    kernel_DV: Float[Tensor, "d v"],
    bias_V: Float[Tensor, " v"] | None,
    states: Sequence[States],
    targets_BT: Int[Tensor, "b t"],
    weights_BT: Float[Tensor, "b t"],
    *,
    hard_weight: float = 0.5,
    block: int = 1024,
) -> DistillLoss:
    """Weighted sums of `a * nll + (1 - a) * D`, where D is the mean of `hidden_loss` over pairs of layers.

    Differentiable in `loss`, by the student and the projections. The states of chosen layers exist whole, logits block
    by block.

    Args:
        hard_weight: a.
        block: tokens whose logits exist at one time.
    """
    weights_BT = weights_BT.to(wide(hidden_BTD.dtype))
    hard = lm_loss(hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT, block=block)
    distances = [hidden_loss(*pair, weights_BT) for pair in states]
    apart = torch.mean(torch.stack(distances))
    loss = hard_weight * hard.loss + (1 - hard_weight) * apart
    return DistillLoss(loss, hard.nll, apart, hard.correct, hard.weight)
