"""Proximal policy optimisation with a value model: the mirror of `jaxlm.recipes.ppo`.

Shapes: B samples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from jaxlm import config
from torch_ref.numerics import wide
from torch_ref.objectives.advantages import gae, token_rewards, whiten
from torch_ref.objectives.value import value_loss
from torch_ref.recipes import grpo
from torch_ref.train.step import Batch, LossFn, Sums

CREDIT = ("advantages", "returns", "old_values")


def objective(modules: Mapping[str, Any], cfg: config.Config) -> LossFn:
    """`batch -> (sum, sums)`: policy and value loss, both divided by what `rl.divisor` says."""
    decoder, rl = modules["model"], cfg.rl
    policy = grpo.of_hidden_states(decoder, cfg)

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        hidden_BTD = decoder.hidden(batch["tokens"], batch["positions"], batch["segments"])[0]
        loss, found = policy(hidden_BTD, batch)
        values_BT = values_of(modules, batch, hidden_BTD)
        weights_BT = batch["weights"].to(values_BT.dtype)
        terms = value_loss(values_BT, batch["old_values"], batch["returns"], weights_BT, clip=rl.value_clip)
        found |= {"value_loss": terms.loss, "value_clip_share": terms.clipped, "squared_error": terms.squared_error}
        found["loss"] = loss + rl.value_weight * terms.loss
        return found["loss"], found

    return compute


def values_of(modules: Mapping[str, Any], batch: Batch, hidden_BTD: Tensor | None = None) -> Tensor:
    """The value of the state after each token [B, T].

    Args:
        modules: the policy, and its value model, from which nothing is dropped out, or the map of its hidden states.
        hidden_BTD: those states; None: they are computed, and nothing is dropped out.
    """
    value, rows = modules["value"], (batch["tokens"], batch["positions"], batch["segments"])
    if isinstance(value, nn.ModuleDict):
        return mapped(modules["model"].eval().hidden(*rows)[0] if hidden_BTD is None else hidden_BTD, value)
    training = value.training
    values_BT = value.eval()(*rows)[0][..., 0]
    value.train(training)
    return values_BT


def mapped(hidden_BTD: Tensor, maps: nn.ModuleDict) -> Tensor:
    """The value of each hidden state [B, T], float32 or wider."""
    kernel_1D = cast(nn.Linear, maps["head"]).weight
    width = wide(hidden_BTD.dtype)
    return (hidden_BTD.to(width) @ kernel_1D.T.to(width))[..., 0]


class TorchCritic(grpo.TorchActor):
    """Policy and value model in PyTorch."""

    def __init__(self, engine: Any, cfg: config.Config, *, eos_id: int, pad: int) -> None:
        super().__init__(engine.decoder, engine.modules.get("reference"), cfg, eos_id=eos_id, pad=pad)
        self.modules: Mapping[str, Any] = engine.modules

    @torch.no_grad()
    def credit(
        self,
        batch: Mapping[str, np.ndarray],
        rewards_B: np.ndarray,
        cut_B: np.ndarray,
        last_B: np.ndarray,
        kl_weight: float,
    ) -> dict[str, np.ndarray]:
        """Advantages (whitened), returns and values of every drawn token."""
        device = self.decoder.embed.weight.device
        rl, arrays = self.config.rl, {name: torch.as_tensor(x, device=device) for name, x in batch.items()}
        values_BT = values_of(self.modules, arrays)
        weights_BT = arrays["weights"].to(values_BT.dtype)
        reference = arrays["reference_logps"] if rl.kl == "reward" else None
        spoken = arrays.get("old_logps", values_BT)
        rewards = torch.as_tensor(rewards_B, dtype=values_BT.dtype, device=device)
        rewards_BT = token_rewards(spoken, reference, rewards, weights_BT, kl_weight=kl_weight)
        after_B = values_BT.gather(1, torch.as_tensor(last_B, device=device)[:, None])[:, 0]
        bootstrap_B = torch.where(torch.as_tensor(cut_B, device=device), after_B, 0)
        credit = gae(rewards_BT, values_BT, weights_BT, bootstrap_B, discount=rl.discount, lam=rl.lam)
        found = whiten(credit.advantages, weights_BT), credit.returns, values_BT
        return {name: x.cpu().numpy() for name, x in zip(CREDIT, found, strict=True)}


def actor_of(engine: Any, cfg: config.Config, **ends: int) -> TorchCritic:
    """Policy and value model of an engine as they stand."""
    return TorchCritic(engine, cfg, **ends)
