"""Options of learning from pairs of answers: `[preference]`, and of a reward model: `[reward]`.

This module imports neither jax nor torch, so both backends share it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from jaxlm.config.model_parts import STRICT, require


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Preference:
    """Pairs of answers, and the loss of a pair; docs/preference.md has each formula with its source."""

    loss: Literal["dpo", "cdpo", "robust", "ipo", "hinge", "simpo", "orpo", "kto"] = "dpo"
    """`simpo` and `orpo` need no reference; `kto` takes answers that are each wanted or not: a pair is two of them."""
    beta: PositiveFloat = 0.1
    """Scale of the implicit reward: the smaller, the further the model may move."""
    label_noise: NonNegativeFloat = 0.1
    """Share of pairs whose label is believed wrong (`cdpo`, `robust`)."""
    gamma: NonNegativeFloat = 0.5
    """Margin that `simpo` asks for."""
    odds_weight: NonNegativeFloat = 0.1
    """Weight of `orpo`'s odds ratio beside its language-model loss."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the mean negative log-likelihood of the chosen answer, beside any loss but `kto`."""
    desirable_weight: NonNegativeFloat = 1.0
    """Weight of answers that are wanted (`kto`)."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of answers that are not (`kto`)."""
    reference: str = ""
    """The frozen model that the loss compares with; empty: where the run starts, `train.init_from`."""
    cached_reference: bool = False
    """Compute what the reference thinks of each answer once, before training, and keep it in `data.cache_dir`: no step
    runs a second model, nor holds one."""
    dropout: bool = False
    """Drop out as `[model]` says when the policy is trained; the reference never does."""
    template: str = "auto"
    """Chat template, as of `[sft]`."""
    system: str = ""
    """A system message for prompts that have none."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of a pair that does not fit into a row of `data.seq_len`: the ends of its answers may be cut."""
    pairs_per_row: PositiveInt = 8
    """Most pairs that are packed into a row, where they do not see each other; 1: one a row."""

    def __post_init__(self) -> None:
        require(self.label_noise < 0.5, f"preference.label_noise = {self.label_noise} must be below 0.5")
        require(
            not self.sft_weight or self.loss != "kto",
            f"preference.sft_weight = {self.sft_weight}: kto has no chosen answer",
        )
        require(
            not self.cached_reference or self.needs_reference,
            f"preference.cached_reference: {self.loss} compares with no reference",
            "preference.cached_reference=false",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a frozen model."""
        return self.loss not in ("simpo", "orpo")

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of `objectives.preference.preference_loss`, or of `objectives.kto.kto_loss`."""
        if self.loss == "kto":
            weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
            return {"beta": self.beta, **weights}
        names = ("beta", "label_noise", "gamma", "odds_weight", "sft_weight")
        return {"kind": self.loss, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Reward:
    """The loss of a reward model (recipe `reward`); its pairs are those of `[preference]`."""

    loss: Literal["logistic", "hinge"] = "logistic"
    """-log s(d - m), or max(0, m - d), of the difference d of the scores and the margin m of the pair."""
    label_smoothing: NonNegativeFloat = 0.0
    """Share of pairs whose label is believed wrong."""
    centring: NonNegativeFloat = 0.0
    """Weight of (r_c + r_r)^2, which fixes the zero of the scores (Eisenstein et al. 2023)."""

    def __post_init__(self) -> None:
        require(self.label_smoothing < 0.5, f"reward.label_smoothing = {self.label_smoothing} must be below 0.5")

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of `objectives.reward.reward_loss`, in both frameworks."""
        return {"kind": self.loss, "label_smoothing": self.label_smoothing, "centring": self.centring}


__all__ = ["Preference", "Reward"]
