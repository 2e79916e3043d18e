"""What is asked of an engine and what comes back: plain values, no framework.

    Request("def add(a, b):", sampling=Sampling(temperature=0.2), max_new_tokens=64, n=2, stop=("\\n\\n",), seed=7)

A choice's random numbers depend on the seed, the number of the choice and the place in its text, never on what else is
decoded (`growing.uniforms`): choice i of a request is the only choice of the same request with `sample = i`, `n = 1`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from jaxlm.errors import UserError
from jaxlm.text.completion import Guessed
from jaxlm.text.sampling import Sampling

ENDS = 32
"""Ids that may end a text."""
MOST_LOGPROBS = 20
MOST_CHOICES = 128
MOST_STOPS = 16
MOST_BIASES = 1024
MOST_FORCED = 4095
LONGEST_STOP = 1000

Finish = Literal["stop", "length", "context", "cancelled", "deadline", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """What a text must look like; exactly one of these."""

    json_schema: str = ""
    """A JSON schema, as text."""
    regex: str = ""
    choices: tuple[str, ...] = ()
    """One of these strings."""
    lark: str = ""
    """A grammar in Lark's language."""

    def __post_init__(self) -> None:
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]
        if len(given) != 1:
            raise UserError(
                f"a grammar is one of json_schema, regex, choices, lark: {' and '.join(given) or 'none'} given"
            )


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to continue, and how. Everything is checked at once.

    Raises:
        UserError: a value is out of its range.
    """

    prompt: str | Sequence[int]
    """Text, in which special tokens may be spelled out; or ids, which are taken as they are."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling, kw_only=True)
    max_new_tokens: int | None = dataclasses.field(default=None, kw_only=True)
    """Tokens of a text; None: as many as the model has room for, if something can end it."""
    min_new_tokens: int = dataclasses.field(default=0, kw_only=True)
    """Before so many tokens no end is drawn."""
    seed: int = dataclasses.field(default=0, kw_only=True)
    sample: int = dataclasses.field(default=0, kw_only=True)
    """Number of the first choice."""
    n: int = dataclasses.field(default=1, kw_only=True)
    """Texts."""
    best_of: int | None = dataclasses.field(default=None, kw_only=True)
    """Draw so many and keep the n with the largest mean log-probability; None: n."""
    stop: Sequence[str] = dataclasses.field(default=(), kw_only=True)
    """A text ends before the first of these strings."""
    stop_ids: Sequence[int] = dataclasses.field(default=(), kw_only=True)
    """Ids that end a text besides those of the model."""
    ignore_eos: bool = dataclasses.field(default=False, kw_only=True)
    """The model's own end ids do not end a text: for benchmarks."""
    logprobs: int | None = dataclasses.field(default=None, kw_only=True)
    """Log-probabilities of the drawn tokens and of so many of the likeliest; None: none at all."""
    processed: bool = dataclasses.field(default=False, kw_only=True)
    """Log-probabilities of the distribution that is drawn from; otherwise of the raw logits."""
    echo: bool = dataclasses.field(default=False, kw_only=True)
    """Log-probabilities of the prompt too."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, kw_only=True)
    """Added to the logits of these ids."""
    forbidden: Sequence[int] = dataclasses.field(default=(), kw_only=True)
    """Ids that are never drawn."""
    forced: Sequence[int] = dataclasses.field(default=(), kw_only=True)
    """The text begins with these ids, whatever would be drawn; their log-probabilities are those of any drawn token."""
    grammar: Grammar | None = dataclasses.field(default=None, kw_only=True)
    priority: int = dataclasses.field(default=0, kw_only=True)
    """A request goes before those that came up to 64 places earlier for each step of priority."""
    deadline: float | None = dataclasses.field(default=None, kw_only=True)
    """Seconds from submission after which the text ends as it is."""
    tenant: str = dataclasses.field(default="", kw_only=True)
    """Whose it is: tenants take turns and share no prefixes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", self.prompt if isinstance(self.prompt, str) else tuple(self.prompt))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for name in ("stop", "stop_ids", "forbidden", "forced"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if problem := next((text for holds, text in self._bounds() if not holds), None):
            raise UserError(problem)

    @property
    def choices(self) -> int:
        """Texts that are drawn."""
        return self.best_of or self.n

    def _bounds(self) -> tuple[tuple[bool, str], ...]:
        drawn, longest = self.choices, max(map(len, self.stop), default=0)
        biased = len(self.logit_bias) + len(self.forbidden)
        finite = all(math.isfinite(value) for value in self.logit_bias.values())
        return (
            (
                self.max_new_tokens is None or self.max_new_tokens >= 1,
                f"max_new_tokens = {self.max_new_tokens} must be positive",
            ),
            (self.min_new_tokens >= 0, f"min_new_tokens = {self.min_new_tokens} must be 0 or more"),
            (self.seed >= 0, f"seed = {self.seed} must be 0 or more"),
            (self.sample >= 0, f"sample = {self.sample} must be 0 or more"),
            (1 <= self.n <= MOST_CHOICES, f"n = {self.n} must be between 1 and {MOST_CHOICES}"),
            (drawn <= MOST_CHOICES, f"best_of = {drawn} must be at most {MOST_CHOICES}"),
            (drawn >= self.n, f"best_of = {self.best_of} must be n = {self.n} or more"),
            (len(self.stop) <= MOST_STOPS, f"stop has {len(self.stop)} strings, at most {MOST_STOPS} are possible"),
            ("" not in self.stop, "a stop string is empty"),
            (longest <= LONGEST_STOP, f"a stop string has {longest} characters, at most {LONGEST_STOP} are possible"),
            (
                len(self.stop_ids) <= ENDS // 2,
                f"stop_ids has {len(self.stop_ids)} ids, at most {ENDS // 2} are possible",
            ),
            (
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"logprobs = {self.logprobs} must be between 0 and {MOST_LOGPROBS}",
            ),
            (biased <= MOST_BIASES, f"logit_bias and forbidden have {biased} ids, at most {MOST_BIASES} are possible"),
            (finite, "logit_bias holds a value that is not finite: forbid an id with `forbidden`"),
            (len(self.forced) <= MOST_FORCED, f"forced has {len(self.forced)} ids, at most {MOST_FORCED} are possible"),
            (self.deadline is None or self.deadline > 0, f"deadline = {self.deadline} s is past"),
        )


class LogProb(NamedTuple):
    """Of one token, and of the likeliest in its place, falling."""

    token: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a request has cost."""

    prompt: int = 0
    reused: int = 0
    """Of the prompt, found as a prefix of an earlier one or shared among choices."""
    completion: int = 0
    drafted: int = 0
    accepted: int = 0
    """Of the drafted tokens, those that were drawn."""
    checks: int = 0
    """Calls of the model that looked at drafted tokens."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a choice's text as it arrives: whole characters, no part of a stop string."""

    index: int
    text: str
    ids: tuple[int, ...] = ()
    log_probs: tuple[LogProb, ...] = ()
    finish: Finish | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """One text, whole. `ids` are all that were drawn, the end id or the stop string included."""

    index: int
    text: str
    ids: tuple[int, ...]
    finish: Finish
    ended_by: str | int | None = None
    """The stop string, the end id or `grammar`; the error's line."""
    log_probs: tuple[LogProb, ...] = ()
    guessed: Guessed = dataclasses.field(default=Guessed(), compare=False)


@dataclasses.dataclass(frozen=True)
class Result:
    """All choices of a request, by index, with what they cost."""

    request: Request
    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    prompt_log_probs: tuple[LogProb, ...] = ()
    """With `echo`: of each token of the prompt but the first."""

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def ids(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].ids

    @property
    def finish(self) -> Finish:
        """Of the first choice."""
        return self.choices[0].finish
