"""The training step: microbatches, gradient, clip, guard, update. It serves every objective.

    step = make_step(loss_fn, make_optimizer(decoder, config.train), config.train, seed=0)
    state, metrics = step(TrainState(), batch)

`loss_fn(batch)` returns a sum over the targets of the batch, and sums to report beside it; `weight` among them divides
all. So microbatches with different numbers of targets add up to the large batch, up to rounding; balancing terms and
capacities of experts alone are those of each microbatch. Parameters and moments change in place, in the decoder and the
optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from jaxlm import config
from torch_ref.models.decoder import Decoder
from torch_ref.train.expert_balance import load_metrics, update_biases
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


class Part(NamedTuple):
    """How one trained module moves."""

    name: str
    train: config.Train
    optimizer: torch.optim.Optimizer
    module: nn.Module | None = None
    """Selection biases of its experts, if it has some, move after the update by the load of the whole batch."""
    adapters: bool = False
    """Only the adapters of the module move and are saved; its routers are frozen too."""

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def balanced(self) -> Decoder | None:
        """The module, if it has experts that are trained."""
        module = self.module
        return module if isinstance(module, Decoder) and module.config.moes and not self.adapters else None


def make_step(
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    train: config.Train,
    *,
    seed: int,
    decoder: Decoder | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """`make_steps` for one module, all of which moves."""
    return make_steps(loss_fn, [Part("model", train, optimizer, decoder)], train.microbatches, seed=seed)


def make_steps(
    loss_fn: LossFn,
    parts: Sequence[Part],
    microbatches: int,
    *,
    seed: int,
    whole: Callable[[Batch], Sums] | None = None,
    update_if: Callable[[Sums], Tensor] | None = None,
    divisors: Mapping[str, str] = {},
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The update `(state, batch) -> (state, metrics)`.

    A loss, gradient or update that is not finite changes nothing but the counters. Metrics: `loss` and the means of the
    other sums, `weight` (targets in the batch), `grad_norm` (before clipping), `learning_rate`, `skipped` (in a row);
    of modules other than `model` `NAME_grad_norm` and `NAME_learning_rate`. With experts, those of `load_metrics`.

    Args:
        whole: see `recipe.Objective.torch_whole`.
        update_if: see `recipe.Objective`, as for `divisors`.
    """
    for part in parts:
        for parameter in part.parameters:  # one that takes no part has a gradient of zero, as in JAX, and decays
            parameter.grad = torch.zeros_like(parameter)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        for part in parts:
            part.optimizer.zero_grad(set_to_none=False)
        if whole and microbatches > 1:
            with torch.no_grad():
                batch = {**batch, **_over_batch(whole, batch, microbatches)}
        sums = _accumulate(loss_fn, batch, (seed, state.step), microbatches)
        weight, metrics = sums["weight"].clamp(min=1), _means(sums, divisors)
        finite = bool(torch.isfinite(metrics["loss"]))  # waits for the device
        for part in parts:
            prefix = "" if part.name == "model" else f"{part.name}_"
            grad_norm = _norm(_gradients(part)) / weight
            finite = finite and bool(torch.isfinite(grad_norm))
            rate = torch.tensor(set_learning_rate(part.optimizer, part.train), dtype=torch.float64)
            metrics |= {f"{prefix}grad_norm": grad_norm, f"{prefix}learning_rate": rate}
        allowed = bool(update_if(sums)) if update_if else True
        metrics |= {"stopped": torch.tensor(1.0 - allowed)} if update_if else {}
        if finite and allowed:
            finite = _update(parts, weight, metrics)
        if finite and allowed:
            for decoder in filter(None, (part.balanced for part in parts)):
                update_biases(decoder, sums["expert_load"])
        skipped = 0 if finite else state.skipped + 1
        metrics["skipped"] = torch.tensor(skipped)
        for decoder in filter(None, (part.balanced for part in parts)):
            metrics |= load_metrics(decoder, sums)
        return TrainState(state.step + 1, skipped), metrics

    return step


def _gradients(part: Part) -> list[Tensor]:
    return [parameter.grad for parameter in part.parameters if parameter.grad is not None]


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar."""
    # By squares and their sum, which adds in pairs and is exact to 1e-7. `vector_norm` adds one after the other: of 28
    # million float32 numbers it is 1.7e-3 too small on the CPU (torch 2.13; pytorch#68326, pytorch#169237).
    return torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()


def _means(sums: Sums, divisors: Mapping[str, str]) -> Sums:
    """The sums of a batch, each divided by the sum that divides it, and the weight as it is."""
    means = {
        name: value / sums[divisors.get(name, "weight")].clamp(min=1)
        for name, value in sums.items()
        if name not in COUNTS
    }
    return means | {"weight": sums["weight"]}


def _update(parts: Sequence[Part], weight: Tensor, metrics: Sums) -> bool:
    """Clip and update every part; if a parameter would not be finite, nothing is changed and False is returned."""
    for part in parts:
        scale = 1 / weight
        if part.train.clip_norm:
            norm = metrics["grad_norm" if part.name == "model" else f"{part.name}_grad_norm"]
            scale = scale * (part.train.clip_norm / (norm + 1e-6)).clamp(max=1)
        for grad in _gradients(part):
            grad.mul_(scale.to(grad.dtype))
    if not all(_bounded(part) for part in parts):
        return False
    for part in parts:
        part.optimizer.step()
    return True


def _bounded(part: Part) -> bool:
    """Whether an update is finite whatever the gradient: the rate is, and no beta makes the bias correction zero."""
    return all(math.isfinite(group["lr"]) and max(group["betas"]) < 1 for group in part.optimizer.param_groups)


def make_eval(loss_fn: LossFn) -> Callable[[Batch], Sums]:
    """`batch -> sums`, numbers only, without gradients."""

    def evaluate(batch: Batch) -> Sums:
        with torch.no_grad():
            return {name: value for name, value in loss_fn(batch)[1].items() if value.ndim == 0}

    return evaluate


def _over_batch(function: Callable[[Batch], Sums], batch: Batch, microbatches: int) -> Sums:
    """The sums of a function over all microbatches."""
    parts = [function(_microbatch(batch, index, microbatches)) for index in range(microbatches)]
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def _microbatch(batch: Batch, index: int, microbatches: int) -> Batch:
    """Row b goes to microbatch b mod M, as in jaxlm."""
    return {name: x[index::microbatches] if x.ndim else x for name, x in batch.items()}


def _accumulate(loss_fn: LossFn, batch: Batch, entropy: tuple[int, int], microbatches: int) -> Sums:
    """Sums of the whole batch, one microbatch at a time; the gradients are added to those of the parameters."""
    total: Sums = {}
    for index in range(microbatches):
        torch.manual_seed(int(np.random.SeedSequence((*entropy, index)).generate_state(1, np.uint64)[0]))  # for dropout
        loss, sums = loss_fn(_microbatch(batch, index, microbatches))
        loss.backward()
        total = {name: total.get(name, 0) + value.detach() for name, value in sums.items()}
    return total
