"""A teacher's distributions, whole or as its likeliest tokens, and the divergence of a student from them.

Shapes: B batch, T length, E width of the teacher, V vocabulary, K likeliest tokens, C tokens of a block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.numerics import wide_matmul
from torch_ref.objectives.blocks import block_count, join, split


class Teacher(NamedTuple):
    """A teacher in memory: its hidden states and its output matrix."""

    hidden_BTE: Float[Tensor, "b t e"]
    kernel_EV: Float[Tensor, "e v"]
    bias_V: Float[Tensor, " v"] | None = None


class LikeliestTokens(NamedTuple):
    """What is kept of a teacher: its K likeliest tokens, and all others as one."""

    logps_BTK: Float[Tensor, "b t k"]
    """Log-probabilities at the temperature of the loss, largest first."""
    ids_BTK: Int[Tensor, "b t k"]
    rest_BT: Float[Tensor, "b t"]
    """Log-probability of all other tokens together; of no account where K = V."""


def divergence(
    logp_BTV: Float[Tensor, "b t v"], teacher_BTV: Float[Tensor, "b t v"], beta: float
) -> Float[Tensor, "b t"]:
    """D of two distributions by their log-probabilities, as `distill_loss` has it."""
    if beta == 0:
        return _kl(teacher_BTV, logp_BTV)
    if beta == 1:
        return _kl(logp_BTV, teacher_BTV)
    mixture_BTV = torch.logaddexp(math.log(beta) + teacher_BTV, math.log1p(-beta) + logp_BTV)
    return beta * _kl(teacher_BTV, mixture_BTV) + (1 - beta) * _kl(logp_BTV, mixture_BTV)


def likeliest_tokens(teacher: Teacher, k: int, *, temperature: float = 1.0, block: int = 1024) -> LikeliestTokens:
    """The `k` likeliest tokens of a teacher at each place, and the log-probability of all others together."""
    pieces = []
    for (hidden_BCE,) in split([teacher.hidden_BTE], block_count(teacher.hidden_BTE.shape, block)):
        logits_BCV = wide_logits(hidden_BCE, teacher.kernel_EV, teacher.bias_V)
        logp_BCV = torch.log_softmax(logits_BCV / temperature, dim=-1)
        # Sorted, not `topk`: of equal log-probabilities the lower id comes first, as in JAX.
        logps_BCV, ids_BCV = torch.sort(logp_BCV, dim=-1, descending=True, stable=True)
        ids_BCK = ids_BCV[..., :k]
        pieces.append(LikeliestTokens(logps_BCV[..., :k], ids_BCK, _log_rest(logp_BCV, ids_BCK)))
    return LikeliestTokens(*(join(piece) for piece in zip(*pieces, strict=True)))


def outcomes(logp_BCV: Tensor, teacher_BCK: Tensor, ids_BCK: Tensor, rest_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Student and teacher over K + 1 outcomes; over the whole vocabulary where no token is left for the last."""
    kept_BCK = logp_BCV.gather(-1, ids_BCK)
    if ids_BCK.shape[-1] == logp_BCV.shape[-1]:
        return kept_BCK, teacher_BCK
    rests = _log_rest(logp_BCV, ids_BCK), rest_BC
    student_BCJ, teacher_BCJ = (
        torch.cat([kept, rest[..., None]], dim=-1) for kept, rest in zip((kept_BCK, teacher_BCK), rests, strict=True)
    )
    return student_BCJ, teacher_BCJ


def wide_logits(hidden_BCD: Tensor, kernel_DV: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits in float32 or wider."""
    logits_BCV = wide_matmul(hidden_BCD, kernel_DV)
    return logits_BCV if bias_V is None else logits_BCV + bias_V


def _log_rest(logp_BCV: Tensor, ids_BCK: Tensor) -> Tensor:
    """Log-probability of all tokens but these: a sum, not a difference, so that a small rest keeps its digits."""
    return torch.logsumexp(logp_BCV.scatter(-1, ids_BCK, -torch.inf), dim=-1)


def _kl(a_BCV: Tensor, b_BCV: Tensor) -> Tensor:
    return torch.sum(torch.exp(a_BCV) * (a_BCV - b_BCV), dim=-1)
