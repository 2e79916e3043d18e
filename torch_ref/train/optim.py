"""AdamW by PyTorch: decoupled weight decay (Loshchilov & Hutter 2019), never on norms and biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from jaxlm import config
from jaxlm.run.schedule import learning_rate
from jaxlm.train.recipe import parameter_name
from torch_ref.models.adapter import Adapter
from torch_ref.models.layers import Embed, Head, Linear
from torch_ref.models.mamba import CausalConv, StepSize
from torch_ref.models.moe import ExpertLinear, Router

DECAYED = (Linear, Embed, Head, ExpertLinear, Router, CausalConv, StepSize, Adapter)


def make_optimizer(
    decoder: nn.Module, train: config.Train, moves: Callable[[str], bool] | None = None
) -> torch.optim.AdamW:
    """AdamW for the parameters of a decoder that move, as `decay_mask` says. The step sets the learning rate."""
    moving = {name: p for name, p in decoder.named_parameters() if moves is None or moves(parameter_name(name))}
    return adamw([(moving[name], decays) for name, decays in decay_mask(decoder).items() if name in moving], train)


def adamw(parameters: Iterable[tuple[nn.Parameter | Tensor, bool]], train: config.Train) -> torch.optim.AdamW:
    """AdamW in one pass over memory, with moments of zero, for parameters that decay and others that do not."""
    parameters = list(parameters)
    groups = [
        {
            "params": [parameter for parameter, decays in parameters if decays == group],
            "weight_decay": train.weight_decay if group else 0.0,
        }
        for group in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)
    for parameter, _ in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def decay_mask(decoder: nn.Module) -> dict[str, bool]:
    """For each parameter by name: True for matrices and embeddings, which decay; False for norm scales and biases."""
    return {
        name: isinstance(decoder.get_submodule(name.rpartition(".")[0]), DECAYED)
        and name.endswith((".weight", ".a", ".b"))
        for name, _ in decoder.named_parameters()
    }


def updates_made(optimizer: torch.optim.Optimizer) -> int:
    """How many updates the moments have seen; skipped ones do not count."""
    return int(next(iter(optimizer.state.values()))["step"])


def set_learning_rate(optimizer: torch.optim.Optimizer, train: config.Train) -> float:
    """Give the next update its learning rate, and return it."""
    rate = float(learning_rate(train, updates_made(optimizer)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
