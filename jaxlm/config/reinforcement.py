"""Options of reinforcement learning: `[rl]`.

This module imports neither jax nor torch, so both backends share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxlm.config.model_parts import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RL:
    """Samples of the model, what they are worth, and how the model follows."""

    task: str = ""
    """Where prompts come from: `addition(digits=2)`, `reverse(length=4)`, ..., or a file of prompts with answers."""
    template: str = ""
    """The chat template in which the model is asked, as `sft.template`; empty: a prompt is plain text."""
    rewards: tuple[str, ...] = ()
    """Each `name(option=value) * weight`, or `module:function` of your own."""
    prompts: PositiveInt = 32
    """Prompts of a phase."""
    group: PositiveInt = 8
    """Samples of each prompt; their mean reward is what a sample is measured against."""
    max_new_tokens: PositiveInt = 16
    """Longest completion, the end token included."""
    temperature: PositiveFloat = 1.0
    """Of sampling, and of every log-probability."""
    top_k: NonNegativeInt = 0
    """Refused: only the whole distribution can be trained. It stands here to say so."""
    top_p: PositiveFloat = 1.0
    """Refused, as `top_k`."""
    iterations: PositiveInt = 1
    """How often the samples of a phase are trained on."""
    minibatches: PositiveInt = 1
    """Updates of one iteration."""
    advantage: Literal["group", "batch", "none", "rloo"] = "group"
    """`group`: (R - mean) / std of the group; `batch`: std of the phase; `none`: R - mean; `rloo`: R - others' mean."""
    divisor: Literal["sequence", "token", "constant"] = "token"
    """A mean over samples of their means, over all tokens (DAPO), or over samples times `max_new_tokens` (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Of each token, or of the sample as a whole (GSPO)."""
    clipping: Literal["ppo", "cispo"] = "ppo"
    """`cispo` clips the weight and keeps the gradient of every token."""
    clip_low: PositiveFloat = 0.2
    """The ratio counts down to 1 - this."""
    clip_high: PositiveFloat = 0.2
    """The ratio counts up to 1 + this."""
    clip_dual: NonNegativeFloat = 0.0
    """Bound of the ratio for samples worse than their group; 0: none. Above 1 + `clip_high`."""
    correction: Literal["none", "truncate", "mask"] = "none"
    """Weigh a token by w = exp(trainer's - sampler's log-probability), where the two programs differ: at most
    `correction_cap`, or 0 above it."""
    correction_level: Literal["token", "sequence"] = "token"
    """w of each token, or the product over a sample."""
    correction_cap: PositiveFloat = 2.0
    """Largest w."""
    kl: Literal["none", "loss", "reward"] = "none"
    """Hold the model near where it started: in the loss, or as a part of the reward."""
    kl_kind: Literal["k1", "k2", "k3", "unbiased"] = "k3"
    """Estimator of the divergence; docs/reinforcement.md has what each one's gradient is."""
    kl_weight: NonNegativeFloat = 0.05
    """Of the divergence."""
    kl_target: NonNegativeFloat = 0.0
    """Nats a sample may lie from the start: `kl_weight` follows it phase by phase (`kl = "reward"`); 0: it is fixed."""
    kl_horizon: PositiveInt = 10000
    """Samples over which `kl_weight` follows: the larger, the slower."""
    stop_kl: NonNegativeFloat = 0.0
    """An update is left out where the policy is this far, in nats a token, from the one that drew; 0: none is."""
    value_weight: NonNegativeFloat = 0.5
    """Of the value model's loss (recipe `ppo`)."""
    value_clip: NonNegativeFloat = 0.2
    """How far a value may move from that of the rollout, as the loss counts (`ppo`); 0: as far as it likes."""
    value_trunk: Literal["own", "shared"] = "own"
    """Of the value model (`ppo`): a model beside the policy, or the policy's, with a linear map beside its head."""
    value_from: str = ""
    """The run whose trunk a value model of its own begins with (`ppo`), such as a reward model; empty:
    `train.init_from`."""
    value_learning_rate: NonNegativeFloat = 0.0
    """Of the value model (`ppo`); 0: that of `[train]`."""
    discount: PositiveFloat = 1.0
    """Of a reward one token later (`ppo`)."""
    lam: NonNegativeFloat = 0.95
    """How far advantages look ahead (`ppo`): 0 one token, 1 to the end."""
    entropy_weight: NonNegativeFloat = 0.0
    """Of a bonus for entropy."""
    cut: Literal["keep", "mask"] = "keep"
    """Samples that reach `max_new_tokens` without an end: trained like others, or not at all."""
    refills: NonNegativeInt = 0
    """Prompts whose samples all have the same reward are replaced, this often; 0: they stay and teach nothing."""
    held_out: PositiveInt = 200
    """Prompts that training never shows, by which a run is judged."""
    evaluate_every: PositiveInt = 20
    """Phases between two greedy answers to the held-out prompts."""
    grader_seconds: PositiveFloat = 10.0
    """Longest time that a reward of your own may take for one sample."""
    keep_every: NonNegativeInt = 10
    """Phases between two whose samples are kept in `rollouts/` of the run, for `jaxlm rollouts`; 0: none."""

    def __post_init__(self) -> None:
        require(
            not self.top_k and self.top_p == 1,
            "rl.top_k and rl.top_p are for evaluation: training would take the ratio of two different distributions",
            "use rl.temperature",
        )
        require(
            not self.clip_dual or self.clip_dual > 1 + self.clip_high,
            f"rl.clip_dual = {self.clip_dual} must be above 1 + rl.clip_high = {1 + self.clip_high}",
        )
        require(
            not self.value_from or self.value_trunk == "own",
            f"rl.value_from = {self.value_from!r}: a shared trunk is the policy's",
            'rl.value_trunk = "own"',
        )
        require(
            self.kl != "reward" or self.kl_kind == "k1",
            f"rl.kl_kind = {self.kl_kind!r} in the reward has another gradient than the divergence's",
            'rl.kl_kind = "k1"',
        )
        require(
            not self.kl_target or self.kl == "reward",
            f"rl.kl_target = {self.kl_target} moves the weight of the divergence in the reward",
            'rl.kl = "reward"',
        )
        require(
            not self.stop_kl or self.iterations * self.minibatches > 1,
            f"rl.stop_kl = {self.stop_kl}: with one update a phase the policy is the one that drew the samples",
            "rl.iterations or rl.minibatches above 1",
        )
        samples = self.prompts * self.group
        require(
            samples % self.minibatches == 0,
            f"rl.minibatches = {self.minibatches} does not divide prompts x group = {samples}",
        )
        require(
            not self.kl_target or self.kl_weight > 0,
            f"rl.kl_target = {self.kl_target}: a weight of 0 cannot follow it",
            "rl.kl_weight=0.05",
        )
        require(
            not self.kl_target or samples < 5 * self.kl_horizon,
            f"rl.kl_horizon = {self.kl_horizon}: {samples} samples a phase could turn rl.kl_weight negative",
            f"rl.kl_horizon={samples // 5 + 1} or more",
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The log-probabilities that batches hold beside the rows: as drawn, of the trainer then, of the reference."""
        several = self.iterations * self.minibatches > 1
        old = ("old_logps",) if several or self.kl == "reward" or self.correction != "none" else ()
        return ("sampler_logps", *old, *(("reference_logps",) if self.kl != "none" else ()))

    @property
    def measures(self) -> tuple[str, ...]:
        """Numbers of a phase that these options add: nats a sample from the start and their weight, and the largest
        difference of the sampler's and the trainer's log-probabilities."""
        largest = ("mismatch_max",) if "old_logps" in self.columns else ()
        start = ("kl_start",) if self.kl == "reward" else ()
        return (*largest, *start, *(("kl_weight",) if self.kl_target else ()))

    @property
    def correction_options(self) -> dict[str, Any]:
        """The options of `objectives.policy.correction_weights`, in both frameworks."""
        return {"correction": self.correction, "level": self.correction_level, "cap": self.correction_cap}

    def stays_near(self, sums: Mapping[str, Any]) -> Any:
        """Whether an update is made, by the sums of its batch in either framework: see `stop_kl`."""
        return sums["kl_old"] <= self.stop_kl * sums["tokens"]

    @property
    def policy_options(self) -> dict[str, Any]:
        """The options of `objectives.policy.policy_loss`, in both frameworks."""
        return {
            "low": self.clip_low,
            "high": self.clip_high,
            "dual": self.clip_dual,
            "clipping": self.clipping,
            "ratio": self.ratio,
            "divisor": self.divisor,
            "longest": self.max_new_tokens,
            "kl_kind": self.kl_kind,
            "kl_weight": self.kl_weight if self.kl == "loss" else 0.0,
            "entropy_weight": self.entropy_weight,
        }


__all__ = ["RL"]
