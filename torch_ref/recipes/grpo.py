"""Group-relative policy optimisation and its relatives, by switches of `[rl]`: the mirror of `jaxlm.recipes.grpo`.

Shapes: B samples, T tokens, C drawn tokens of a sample at most, D width, G prompts, N samples of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jaxlm import config
from jaxlm.text.sampling import Sampling
from torch_ref.infer.generate import draws, generate
from torch_ref.models.attach_lora import base_of
from torch_ref.models.decoder import Decoder
from torch_ref.numerics import wide
from torch_ref.objectives.advantages import adapt_kl_weight, advantages
from torch_ref.objectives.logprobs import TokenLogps, token_logps
from torch_ref.objectives.policy import correction_weights, mismatch, policy_loss
from torch_ref.recipes.forward import drawn_tokens, with_routing
from torch_ref.train.expert_balance import collect
from torch_ref.train.step import Batch, LossFn, Sums


def objective(modules: Mapping[str, Any], cfg: config.Config) -> LossFn:
    """`batch -> (sum, sums)`: the clipped policy gradient of the decoder `model`, for `train.step`."""
    decoder, policy = modules["model"], of_hidden_states(modules["model"], cfg)

    def compute(batch: Batch) -> tuple[Tensor, Sums]:
        return policy(decoder.hidden(batch["tokens"], batch["positions"], batch["segments"])[0], batch)

    return compute


def of_hidden_states(decoder: Decoder, cfg: config.Config) -> Callable[[Tensor, Batch], tuple[Tensor, Sums]]:
    """`(hidden [B, T, D], batch) -> (sum, sums)`: the same, of the hidden states that `decoder` has just computed."""
    rl = cfg.rl

    def compute(hidden_BTD: Tensor, batch: Batch) -> tuple[Tensor, Sums]:
        hidden_BCD, batch = drawn_tokens(hidden_BTD, batch, rl.max_new_tokens)
        spoken = _spoken(decoder, hidden_BCD, batch["targets"], cfg)
        programs = batch.get("old_logps", spoken.logps).detach(), batch["sampler_logps"], batch["weights"]
        programs = tuple(x_BT.to(spoken.logps.dtype) for x_BT in programs)
        correction_BT = correction_weights(*programs, **rl.correction_options) if rl.correction != "none" else None
        arrays = (*policy_arrays(batch, rl), spoken.entropy, correction_BT)
        terms = policy_loss(spoken.logps, *arrays, **rl.policy_options)
        found = reported(terms, spoken.logps, batch)
        found |= dict(zip(("mismatch", "mismatch_kl"), mismatch(*programs), strict=True))
        found = with_routing(found, collect(decoder) if decoder.config.moes else None)
        return found["loss"], found

    return compute


def policy_arrays(batch: Batch, rl: config.RL) -> tuple[Any, Any, Any, Any]:
    """What `policy_loss` takes after the log-probabilities, up to the reference."""
    reference = batch.get("reference_logps") if rl.kl == "loss" else None
    return batch.get("old_logps"), batch["advantages"], batch["weights"], reference


def reported(terms: Any, logps_BT: Tensor, batch: Batch) -> Sums:
    """The sums of a step; the numbers of the phase go along, times the weight that divides them."""
    names = {"clipped": "clip_share", "kl_old": "kl_old", "kl_reference": "kl_reference", "entropy": "entropy"}
    found = {name: getattr(terms, field) for field, name in names.items()}
    found |= {name: value * terms.weight for name, value in batch.items() if value.ndim == 0}
    return {"loss": terms.loss, "weight": terms.weight, "tokens": terms.tokens, **found} | {
        "logp": (logps_BT * batch["weights"]).sum()
    }


def _spoken(decoder: Decoder, hidden_BTD: Tensor, targets_BT: Tensor, cfg: config.Config) -> TokenLogps:
    """Log-probability and entropy at every target, at the temperature of sampling."""
    temperature, block = cfg.rl.temperature, cfg.train.loss_block
    return token_logps(hidden_BTD, *decoder.unembedding(), targets_BT, temperature=temperature, block=block)


def actor_of(engine: Any, cfg: config.Config, **ends: int) -> TorchActor:
    """The policy of an engine as it stands."""
    return TorchActor(engine.decoder, engine.modules.get("reference"), cfg, **ends)


class TorchActor:
    """The policy in PyTorch: `decoder`, which updates change in place, and where it started.

    Args:
        reference: None: the decoder without its adapters, if it has some.
    """

    def __init__(
        self, decoder: Decoder, reference: Decoder | None, cfg: config.Config, *, eos_id: int, pad: int
    ) -> None:
        self.decoder, self.reference, self.config = decoder, reference, cfg
        self.ends: dict[str, int] = {"eos_id": eos_id, "pad_id": pad}

    def draw(
        self, prompts: Sequence[Sequence[int]], *, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """See `jaxlm.recipes.rollouts.phases.Actor`."""
        sampling = Sampling(temperature=temperature)
        return generate(self.decoder, prompts, sampling, max_new_tokens=max_new_tokens, seed=seed, **self.ends)

    def sample(
        self, prompts: Sequence[Sequence[int]], *, samples: int, temperature: float, max_new_tokens: int, seed: int
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """See `jaxlm.recipes.rollouts.phases.Actor`."""
        options: dict[str, Any] = {"samples": samples, "max_new_tokens": max_new_tokens, "seed": seed, **self.ends}
        return draws(self.decoder, prompts, temperature, **options)

    def logps(self, batch: Mapping[str, np.ndarray], *, reference: bool) -> np.ndarray:
        """See `jaxlm.recipes.rollouts.phases.Actor`."""
        decoder = self.decoder if not reference or self.reference is None else self.reference
        bare = base_of(decoder) if reference and self.reference is None else contextlib.nullcontext()
        device = decoder.eval().embed.weight.device
        names = ("tokens", "targets", "positions", "segments")
        named = {name: torch.as_tensor(batch[name], device=device) for name in names}
        with torch.no_grad(), bare:
            hidden_BTD, _ = decoder.hidden(named["tokens"], named["positions"], named["segments"])
            return _spoken(decoder, hidden_BTD, named["targets"], self.config).logps.cpu().numpy()

    def adapted_kl_weight(self, weight: float, kl: float, samples: int) -> float:
        """See `jaxlm.recipes.rollouts.phases.Actor`."""
        rl = self.config.rl
        return adapt_kl_weight(weight, kl, target=rl.kl_target, samples=samples, horizon=rl.kl_horizon)

    def advantages(self, rewards_GN: np.ndarray, valid_GN: np.ndarray) -> np.ndarray:
        """See `jaxlm.recipes.rollouts.phases.Actor`."""
        dtype = wide(getattr(torch, self.config.numerics.compute))
        rewards = torch.as_tensor(rewards_GN, dtype=dtype)
        return advantages(rewards, torch.as_tensor(valid_GN), scaling=self.config.rl.advantage).numpy()
