"""AdamW by PyTorch: decoupled weight decay (Loshchilov & Hutter 2019), never on norms and biases."""

from __future__ import annotations

import torch
from torch import nn

from jaxlm import config
from jaxlm.train.schedule import learning_rate
from torch_ref.models.layers import Embed, Head, Linear
from torch_ref.models.mamba import CausalConv, StepSize
from torch_ref.models.moe import ExpertLinear, Router

DECAYED = (Linear, Embed, Head, ExpertLinear, Router, CausalConv, StepSize)


def make_optimizer(decoder: nn.Module, train: config.Train) -> torch.optim.AdamW:
    """AdamW with two groups, one of which decays, and moments of zero. The step sets the learning rate."""
    decays = decay_mask(decoder)
    parameters = dict(decoder.named_parameters())
    groups = [
        {"params": [parameters[name] for name, decay in decays.items() if decay], "weight_decay": train.weight_decay},
        {"params": [parameters[name] for name, decay in decays.items() if not decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(train.beta1, train.beta2), eps=train.eps)
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def decay_mask(decoder: nn.Module) -> dict[str, bool]:
    """For each parameter by name: True for matrices and embeddings, which decay; False for norm scales and biases."""
    return {
        name: isinstance(decoder.get_submodule(name.rpartition(".")[0]), DECAYED) and name.endswith(".weight")
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
