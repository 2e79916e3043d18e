"""Parts of a model with options of their own: the sections `[model.rope_scaling]`, `[model.moe]`, `[model.mamba]`.

This module imports neither jax nor torch, so both backends share it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
FLOAT32_TINY = 1.1754944e-38
"""The smallest number that float32 does not take for zero."""


def require(condition: bool, message: str, hint: str = "") -> None:
    """Refuse a config: pydantic turns the ValueError into the user's line."""
    if not condition:
        raise ValueError(message if not hint else f"{message} ({hint})")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RopeScaling:
    """How rotary frequencies are stretched, so that a model serves longer texts than it was trained on."""

    kind: Literal["none", "linear", "ntk", "llama3", "yarn"] = "none"
    """`linear`: positions / factor (Chen et al. 2023). `ntk`: a larger base. `llama3`: long waves only. `yarn`: by the
    number of turns within the trained length, with an attention temperature (Peng et al. 2023)."""
    factor: NonNegativeFloat = 0.0
    """How many times longer; 0 takes `model.max_seq_len / original_max_seq_len`."""
    original_max_seq_len: NonNegativeInt = 0
    """The trained length, in tokens; `llama3`, `yarn` and a factor of 0 need it."""
    low_freq_factor: PositiveFloat = 1.0
    """`llama3`: waves longer than the trained length over this are stretched wholly."""
    high_freq_factor: PositiveFloat = 4.0
    """`llama3`: waves shorter than the trained length over this stay."""
    beta_slow: PositiveFloat = 1.0
    """`yarn`: frequencies with fewer turns than this within the trained length are stretched wholly."""
    beta_fast: PositiveFloat = 32.0
    """`yarn`: frequencies with more turns than this stay."""
    truncate: bool = True
    """`yarn`: between the two, begin and end at whole pairs (as published; gpt-oss does not)."""
    attention_factor: NonNegativeFloat = 0.0
    """`yarn`: sine and cosine are multiplied by this; 0 takes 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.kind == "none":
            return
        key = "model.rope_scaling"
        require(
            self.factor >= 1 or not self.factor, f"{key}.factor = {self.factor} is below 1", "0 takes it from lengths"
        )
        require(
            self.original_max_seq_len > 0 or (self.factor > 0 and self.kind in ("linear", "ntk")),
            f"{key}.kind = {self.kind!r} with factor = {self.factor} needs {key}.original_max_seq_len",
        )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            values = getattr(self, low), getattr(self, high)
            require(values[0] < values[1], f"{key}.{low} = {values[0]} is not below {key}.{high} = {values[1]}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MoE:
    """The mixture of experts, the feed-forward `moe`."""

    n_experts: PositiveInt = 8
    """Routed experts E."""
    top_k: PositiveInt = 2
    """Experts of one token; 1 with `renormalize = false` is the Switch layer."""
    d_ff: NonNegativeInt = 0
    """Width of one expert; 0 takes `model.d_ff`."""
    n_shared: NonNegativeInt = 0
    """Experts that every token passes, kept as one feed-forward of `n_shared` times the width."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores: over all experts, or each for itself."""
    renormalize: bool = True
    """Divide the scores of the chosen experts by their sum."""
    route_scale: PositiveFloat = 1.0
    """The routed output is multiplied by this."""
    n_groups: PositiveInt = 1
    """Groups of neighbouring experts; a token chooses among its `top_groups` best (DeepSeek-V3, section 2.1.2)."""
    top_groups: PositiveInt = 1
    """Groups that a token may choose from."""
    noisy: bool = False
    """While training, add learned noise to the logits (Shazeer et al. 2017, equation 4)."""
    capacity_factor: NonNegativeFloat = 0.0
    """Places of an expert, as a multiple of the mean load; what exceeds them is dropped and counted. 0: dropless.

    What is dropped depends on all tokens of a call, so cached decoding differs from a whole pass: generate with 0.
    """
    balance_loss: NonNegativeFloat = 0.0
    """Weight of the Switch loss: E sum f_e P_e (Fedus et al. 2021, equation 4)."""
    importance_loss: NonNegativeFloat = 0.0
    """Weight of the squared coefficient of variation of the summed scores (Shazeer et al. 2017, equation 7, with the
    scores of all experts: Riquelme et al. 2021, appendix A.2)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the mean squared log-partition of the router (Zoph et al. 2022, equation 5)."""
    selection_bias: bool = False
    """Choose experts by score + bias, a state that balances the load without a loss (Wang et al. 2024)."""
    bias_update_rate: NonNegativeFloat = 1e-3
    """How far a step moves the selection bias of an expert, up if its load was below the mean."""
    impl: Literal["auto", "naive", "blocks", "ragged", "megablox"] = "auto"
    """How experts are computed; `auto` picks for the hardware. All compute the same function."""
    exchange: Literal["auto", "all_to_all", "gather"] = "auto"
    """How tokens reach the experts of other devices (`mesh.expert`): `all_to_all` sends each where its experts are,
    `gather` sends all everywhere, which `auto` does if a token has more experts than there are devices. Neither drops
    any."""

    def __post_init__(self) -> None:
        experts, top_k, groups = self.n_experts, self.top_k, self.n_groups
        require(top_k <= experts, f"model.moe.top_k = {top_k} is more than model.moe.n_experts = {experts}")
        require(experts % groups == 0, f"model.moe.n_groups = {groups} does not divide model.moe.n_experts = {experts}")
        if groups == 1:
            return
        size, kept = experts // groups, self.top_groups
        require(kept <= groups, f"model.moe.top_groups = {kept} is more than model.moe.n_groups = {groups}")
        require(size >= 2, f"model.moe.n_groups = {groups}: a group of {size} expert has no two best scores")
        require(
            size * kept > top_k,
            f"model.moe.top_groups = {kept}: groups of {size} experts leave top_k = {top_k} no choice",
            "n_experts / n_groups * top_groups must exceed top_k",
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mamba:
    """The selective state-space mixers `mamba` (Gu & Dao 2023) and `mamba2` (Dao & Gu 2024)."""

    d_state: NonNegativeInt = 0
    """Numbers of state a channel P; 0 takes 16 for `mamba` and 128 for `mamba2`."""
    expand: PositiveInt = 2
    """Channels of the scan are `expand * d_model`."""
    d_conv: PositiveInt = 4
    """Taps of the causal convolution."""
    dt_rank: NonNegativeInt = 0
    """`mamba`: width of the bottleneck of the step size; 0 takes d_model / 16, rounded up."""
    head_dim: PositiveInt = 64
    """`mamba2`: channels of one head."""
    n_groups: PositiveInt = 1
    """`mamba2`: groups of heads that share B and C."""
    dt_min: PositiveFloat = 1e-3
    """Step sizes begin between this ..."""
    dt_max: PositiveFloat = 1e-1
    """... and this, evenly in the logarithm."""
    dt_floor: PositiveFloat = 1e-4
    """No step size begins below this."""
    conv_bias: bool = True
    """The convolution has a bias."""
    proj_bias: bool = False
    """The projections in and out have biases."""
    inner_norms: bool = False
    """`mamba`: RMS-normalise the step size's bottleneck, B and C, as Jamba does."""
    chunk: NonNegativeInt = 0
    """Tokens between two states that training keeps; 0 takes 8 for `mamba` and 64 for `mamba2`."""
    impl: Literal["auto", "sequential", "chunked"] = "auto"
    """`sequential` is the recurrence, token by token; all compute the same function."""

    def filled(self, mixer: str, d_model: int) -> Mamba:
        """The options of a mixer with what is 0 filled in."""
        first = mixer == "mamba"
        fill = {"d_state": 16 if first else 128, "dt_rank": -(-d_model // 16), "chunk": 8 if first else 64}
        return dataclasses.replace(self, **{name: getattr(self, name) or value for name, value in fill.items()})

    def check_heads(self, d_model: int) -> None:
        """Refuse heads of `mamba2` that do not come out even."""
        inner = self.expand * d_model
        require(
            inner % self.head_dim == 0,
            f"model.mamba.head_dim = {self.head_dim} does not divide expand * d_model = {inner}",
        )
        require(
            inner // self.head_dim % self.n_groups == 0,
            f"model.mamba.n_groups = {self.n_groups} does not divide the {inner // self.head_dim} heads of mamba2",
        )
