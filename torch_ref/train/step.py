"""The training step: microbatches, gradient, clip, guard, update. It serves every objective.

    step = make_step(loss_fn(decoder, config.train), make_optimizer(decoder, config.train), config.train, seed=0)
    state, metrics = step(TrainState(), batch)

`loss_fn(batch)` returns a sum over the targets of the batch, and sums to report beside it; `weight` among them divides
all. So microbatches with different numbers of targets add up to exactly the large batch. Parameters and moments change
in place, in the decoder and the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jaxlm import config
from torch_ref.models.decoder import Decoder
from torch_ref.objectives.lm import lm_loss
from torch_ref.train.expert_balance import collect, load_metrics, update_biases
from torch_ref.train.optim import set_learning_rate

Batch = Mapping[str, Tensor]
Sums = dict[str, Tensor]
LossFn = Callable[[Batch], tuple[Tensor, Sums]]
COUNTS = ("weight", "expert_load", "dropped")
"""Sums that are no weighted sums over targets."""


class TrainState(NamedTuple):
    """The counters. Randomness is a function of the seed and `step`, so no generator is kept."""

    step: int = 0
    skipped: int = 0
    """Non-finite updates in a row, up to now."""


def make_step(
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    train: config.Train,
    *,
    seed: int,
    decoder: Decoder | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The update `(state, batch) -> (state, metrics)`.

    A non-finite loss or gradient changes nothing but the counters. Metrics: `loss` and the means of the other sums,
    `weight` (targets in the batch), `grad_norm` (before clipping), `learning_rate`, `skipped` (in a row). With a
    `decoder` that has experts, its selection biases are moved after the update by the load of the whole batch, and
    there are the metrics of `load_metrics`.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:  # a parameter that takes no part has a gradient of zero, as in JAX, and decays
        parameter.grad = torch.zeros_like(parameter)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        optimizer.zero_grad(set_to_none=False)
        sums = _accumulate(loss_fn, batch, (seed, state.step), train.microbatches)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        weight = sums["weight"].clamp(min=1)
        grad_norm = torch.nn.utils.get_total_norm(grads) / weight
        metrics = {name: value / weight for name, value in sums.items() if name not in COUNTS}

        scale = 1 / weight
        if train.clip_norm:
            scale = scale * (train.clip_norm / (grad_norm + 1e-6)).clamp(max=1)
        finite = bool(torch.isfinite(metrics["loss"]) & torch.isfinite(grad_norm))  # waits for the device
        rate = set_learning_rate(optimizer, train)
        if finite:
            for grad in grads:
                grad.mul_(scale.to(grad.dtype))
            optimizer.step()
            if decoder is not None and decoder.config.moes:
                update_biases(decoder, sums["expert_load"])
        skipped = 0 if finite else state.skipped + 1
        metrics |= {
            "weight": sums["weight"],
            "grad_norm": grad_norm,
            "learning_rate": torch.tensor(rate, dtype=torch.float64),
            "skipped": torch.tensor(skipped),
        }
        if decoder is not None and decoder.config.moes:
            metrics |= load_metrics(decoder, sums)
        return TrainState(state.step + 1, skipped), metrics

    return step


def make_eval(loss_fn: LossFn) -> Callable[[Batch], Sums]:
    """`batch -> sums`, numbers only, without gradients."""

    def evaluate(batch: Batch) -> Sums:
        with torch.no_grad():
            return {name: value for name, value in loss_fn(batch)[1].items() if value.ndim == 0}

    return evaluate


def loss_fn(decoder: Decoder, train: config.Train) -> LossFn:
    """The language-model objective of `decoder`, with dropout where that is in training mode."""
    has_experts = bool(decoder.config.moes)

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        hidden_BTD, _ = decoder.hidden(batch["tokens"], batch["positions"], batch["segments"])
        kernel_DV, bias_V = decoder.unembedding()
        terms = lm_loss(
            hidden_BTD,
            kernel_DV,
            bias_V,
            batch["targets"],
            batch["weights"],
            z_loss=train.z_loss,
            label_smoothing=train.label_smoothing,
            block=train.loss_block,
        )
        sums = {"loss": terms.loss, "nll": terms.nll, "accuracy": terms.correct, "weight": terms.weight}
        if has_experts:
            routed = collect(decoder)
            sums |= {name: term * terms.weight for name, term in routed.means.items()} | routed.counts
            sums["loss"] = terms.loss + routed.loss * terms.weight
        return sums["loss"], sums

    return compute


def _accumulate(loss_fn: LossFn, batch: Batch, entropy: tuple[int, int], microbatches: int) -> Sums:
    """Sums of the whole batch, one microbatch at a time; the gradients are added to those of the parameters."""
    total: Sums = {}
    for index in range(microbatches):
        torch.manual_seed(int(np.random.SeedSequence((*entropy, index)).generate_state(1, np.uint64)[0]))  # for dropout
        # row b goes to microbatch b mod M, as in jaxlm
        loss, sums = loss_fn({name: x[index::microbatches] for name, x in batch.items()})
        loss.backward()
        total = {name: total.get(name, 0) + value.detach() for name, value in sums.items()}
    return total
