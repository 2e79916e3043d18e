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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.numerics import wide
from jaxlm.objectives.blocks import block_count, join, split
from jaxlm.objectives.lm import lm_loss
from jaxlm.objectives.teacher import LikeliestTokens, Teacher, divergence, outcomes, wide_logits
from jaxlm.typed_jax import custom_vjp, einsum, tree_map, value_and_grad

Options = tuple[float, float, float, int]
"""beta, hard_weight, temperature, number of blocks."""


class DistillLoss(NamedTuple):
    """Sums over the weighted tokens; divide by `weight` for means. Nats."""

    loss: Float[Array, ""]
    """What is minimised."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets."""
    divergence: Float[Array, ""]
    """D, before tau^2."""
    correct: Float[Array, ""]
    """How often the student's likeliest token was the target."""
    weight: Float[Array, ""]


def distill_loss(
    hidden_BTD: Float[Array, "b t d"],
    kernel_DV: Float[Array, "d v"],
    bias_V: Float[Array, " v"] | None,
    teacher: Teacher | LikeliestTokens,
    targets_BT: Int[Array, "b t"],
    weights_BT: Float[Array, "b t"],
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
    bias_V = jnp.zeros(kernel_DV.shape[1], width) if bias_V is None else bias_V
    options = (beta, hard_weight, temperature, block_count(targets_BT.shape, block))
    weights_BT = weights_BT.astype(width)
    return _blockwise(hidden_BTD, kernel_DV, bias_V, teacher, targets_BT, weights_BT, options)


Slopes = tuple[Array, Array, Array]
"""Gradients with respect to hidden states, kernel and bias."""
Output = tuple[Array, Array | None]
"""Kernel [E, V] and bias [V] of a teacher."""
Piece = tuple[Array, Array, Array, tuple[Array, ...]]
"""Hidden states, targets and weights of a block, and what stands there of the teacher."""


@custom_vjp(6)
def _blockwise(
    hidden_BTD: Array,
    kernel_DV: Array,
    bias_V: Array,
    teacher: Teacher | LikeliestTokens,
    targets_BT: Array,
    weights_BT: Array,
    options: Options,
) -> DistillLoss:
    """The sums, without a gradient."""
    moving, output = _parts(teacher)

    def body(sums: DistillLoss, piece: Piece) -> tuple[DistillLoss, None]:
        hidden_BCD, targets_BC, weights_BC, taught = piece
        student = (hidden_BCD, kernel_DV, bias_V)
        return tree_map(jnp.add, sums, _block_sums(student, output, options, taught, targets_BC, weights_BC)), None

    pieces = split((hidden_BTD, targets_BT, weights_BT, moving), options[-1])
    return jax.lax.scan(body, _zeros(weights_BT), pieces)[0]


def _forward(
    hidden_BTD: Array,
    kernel_DV: Array,
    bias_V: Array,
    teacher: Teacher | LikeliestTokens,
    targets_BT: Array,
    weights_BT: Array,
    options: Options,
) -> tuple[DistillLoss, Slopes]:
    """The sums, and the gradients of the first with respect to hidden, kernel and bias."""
    moving, output = _parts(teacher)

    def body(carry: tuple[DistillLoss, Array, Array], piece: Piece) -> tuple[tuple[DistillLoss, Array, Array], Array]:
        hidden_BCD, targets_BC, weights_BC, taught = piece

        def loss(*student: Array) -> tuple[Array, DistillLoss]:
            sums = _block_sums(student, output, options, taught, targets_BC, weights_BC)
            return sums.loss, sums

        def added(total: Array, term: Array) -> Array:
            return total + term.astype(total.dtype)

        (_, sums), (dhidden_BCD, dkernel_DV, dbias_V) = value_and_grad(loss, (0, 1, 2))(hidden_BCD, kernel_DV, bias_V)
        return tree_map(added, carry, (sums, dkernel_DV, dbias_V)), dhidden_BCD

    width = weights_BT.dtype
    start = (_zeros(weights_BT), jnp.zeros(kernel_DV.shape, width), jnp.zeros(bias_V.shape, width))
    pieces = split((hidden_BTD, targets_BT, weights_BT, moving), options[-1])
    (sums, dkernel_DV, dbias_V), dhidden = jax.lax.scan(body, start, pieces)
    return sums, (join(dhidden), dkernel_DV.astype(kernel_DV.dtype), dbias_V.astype(bias_V.dtype))


def _backward(
    options: Options, slopes: Slopes, cotangents: DistillLoss
) -> tuple[Array, Array, Array, None, None, None]:
    def scaled(slope: Array) -> Array:
        return slope * cotangents.loss.astype(slope.dtype)

    return *tree_map(scaled, slopes), None, None, None


_blockwise.defvjp(_forward, _backward)


def _zeros(weights_BT: Array) -> DistillLoss:
    """Sums over no token."""
    zero = jnp.zeros((), weights_BT.dtype)
    return DistillLoss(zero, zero, zero, zero, zero)


def _parts(teacher: Teacher | LikeliestTokens) -> tuple[tuple[Array, ...], Output | None]:
    """What is cut into blocks along T, and what every block needs."""
    if isinstance(teacher, Teacher):
        return (teacher.hidden_BTE,), (teacher.kernel_EV, teacher.bias_V)
    return tuple(teacher), None


def _block_sums(
    student: tuple[Array, ...],
    output: Output | None,
    options: Options,
    taught: tuple[Array, ...],
    targets_BC: Array,
    weights_BC: Array,
) -> DistillLoss:
    """The sums of a block."""
    beta, hard_weight, temperature, _ = options
    logits_BCV = wide_logits(*student)
    logp_BCV = jax.nn.log_softmax(logits_BCV / temperature)
    if output is None:
        logp_BCV, teacher_logps = outcomes(logp_BCV, *taught)
    else:
        teacher_logps = jax.nn.log_softmax(wide_logits(taught[0], *output) / temperature)
    divergence_BC = divergence(logp_BCV, jax.lax.stop_gradient(teacher_logps), beta)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC
    loss_BC = hard_weight * nll_BC + (1 - hard_weight) * temperature**2 * divergence_BC
    correct_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
    loss, nll, apart, correct = (jnp.sum(x * weights_BC) for x in (loss_BC, nll_BC, divergence_BC, correct_BC))
    return DistillLoss(loss, nll, apart, correct, jnp.sum(weights_BC))


def hidden_loss(
    student_BTD: Float[Array, "b t d"],
    teacher_BTE: Float[Array, "b t e"],
    projection_DE: Float[Array, "d e"],
    weights_BT: Float[Array, "b t"],
) -> Float[Array, ""]:
    """Weighted sum over tokens of the mean square distance after a learned projection (Jiao et al. 2020, eq. 8)."""
    width = wide(student_BTD.dtype)
    projected_BTE = einsum("btd,de->bte", student_BTD, projection_DE, preferred_element_type=width)
    distance_BTE = projected_BTE - jax.lax.stop_gradient(teacher_BTE).astype(width)
    return jnp.sum(jnp.mean(distance_BTE**2, axis=-1) * weights_BT)


class States(NamedTuple):
    """Outputs of a layer of the student and of one of the teacher, and the map by which they are compared."""

    student_BTD: Float[Array, "b t d"]
    teacher_BTE: Float[Array, "b t e"]
    projection_DE: Float[Array, "d e"]


def states_loss(
    hidden_BTD: Float[Array, "b t d"],
    kernel_DV: Float[Array, "d v"],
    bias_V: Float[Array, " v"] | None,
    states: Sequence[States],
    targets_BT: Int[Array, "b t"],
    weights_BT: Float[Array, "b t"],
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
    weights_BT = weights_BT.astype(wide(hidden_BTD.dtype))
    hard = lm_loss(hidden_BTD, kernel_DV, bias_V, targets_BT, weights_BT, block=block)
    distances = [hidden_loss(*pair, weights_BT) for pair in states]
    apart = jnp.mean(jnp.stack(distances))
    loss = hard_weight * hard.loss + (1 - hard_weight) * apart
    return DistillLoss(loss, hard.nll, apart, hard.correct, hard.weight)
