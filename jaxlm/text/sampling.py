"""How the next token is chosen: options, and the random numbers of a generation."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxlm.config import registry
from jaxlm.config.run import LARGEST_SEED
from jaxlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; the arguments of `ops.sampling.sample`, in both frameworks."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    typical_p: float = 1.0
    """Keep the fewest tokens, those of nearly the expected surprise first, whose mass reaches p; 1: all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens whose mass reaches p; 1: all."""
    min_p: float = 0.0
    """Keep tokens at least p times as likely as the likeliest; 0: all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the completion; 1: none."""
    frequency_penalty: float = 0.0
    """Taken from a logit for each time that its token stands in the completion; 0: none."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens in the completion; 0: none."""

    @property
    def counts(self) -> bool:
        """Whether it matters how often a token stands in the completion."""
        return bool(self.frequency_penalty or self.presence_penalty)

    def __post_init__(self) -> None:
        infinite = float("inf")
        for name, holds, need in (
            ("temperature", 0 <= self.temperature < infinite, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("typical_p", 0 < self.typical_p <= 1, "more than 0 and at most 1 (all)"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (all)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (all) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < infinite, "more than 0; 1 is none"),
            ("frequency_penalty", abs(self.frequency_penalty) <= 100, "between -100 and 100; 0 is none"),
            ("presence_penalty", abs(self.presence_penalty) <= 100, "between -100 and 100; 0 is none"),
        ):
            if not holds:
                raise UserError(f"{name} = {getattr(self, name)} must be {need}")


GREEDY = Sampling(temperature=0.0)


def preset(name: str) -> Sampling:
    """The options of `configs/sampling/NAME.toml`: greedy, balanced, creative, precise, natural or fim.

    Raises:
        UserError: there is no preset of that name.
    """
    return Sampling(**registry.sampling(name))  # pyright: ignore[reportArgumentType]


def check_seed(seed: int) -> None:
    """Refuse a seed that a framework does not take.

    Raises:
        UserError: it is negative or above `LARGEST_SEED`.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed = {seed} must lie between 0 and {LARGEST_SEED}")


def uniforms(seed: int, rows: int, length: int) -> np.ndarray:
    """The random numbers of a generation, float32 [rows, length] in [0, 1).

    Column k is for the k-th new token. Row i has the numbers of (seed, i), whatever the other rows are, and a longer
    row begins with the shorter one; they are those of choice i in the engine.

    Raises:
        UserError: the seed is negative or too large for the frameworks.
    """
    check_seed(seed)
    return np.stack([np.random.default_rng([seed, row]).random(length, np.float32) for row in range(rows)])
