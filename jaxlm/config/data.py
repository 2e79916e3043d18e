"""The options of a corpus and of the rows made of it: `[data]`, `[[data.mixture]]`, `[data.fim]` and so on."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from jaxlm.config.model_parts import STRICT, require

FEWEST_FOR_FIM = 16
"""Tokens of half a row: less holds no marks and words around them."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureSource:
    """One corpus of a mixture; `data.mixture.NAME.weight=0.2` on the command line changes its weight."""

    name: str
    """How it is called in metrics and overrides: small letters, digits and underscores."""
    source: str | tuple[str, ...] = "stdlib"
    """Like `data.source`."""
    weight: float | tuple[tuple[int, float], ...] = 1.0
    """Share of the tokens that carry loss, in any unit; or a list of [step, weight]: from this step on."""
    max_epochs: NonNegativeFloat = 0.0
    """How often it is read at most; then its share goes to the others. 0: as often as needed."""
    max_tokens: NonNegativeInt = 0
    """How many tokens that carry loss it may give in all; 0: no limit."""
    languages: tuple[str, ...] = ()
    """Like `data.languages`."""
    extensions: tuple[str, ...] = ()
    """Like `data.extensions`, which is for a corpus that has none of its own."""
    text_key: str = ""
    """Like `data.text_key`, which is for a corpus that has none of its own."""

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[a-z0-9_]+", self.name)),
            f"data.mixture: the name {self.name!r} must be of small letters, digits and underscores",
        )
        steps = [step for step, _ in self.points]
        where = f"data.mixture.{self.name}.weight"
        for _, weight in self.points:
            require(math.isfinite(weight) and weight >= 0, f"{where} = {weight} must be 0 or more")
        require(bool(steps) and steps[0] == 0, f"{where}: the first step of a list must be 0")
        require(steps == sorted(set(steps)), f"{where}: the steps must rise: {steps}")
        require(any(weight > 0 for _, weight in self.points), f"{where} is 0 throughout: remove the corpus")

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """The weights as (step, weight)."""
        return self.weight if isinstance(self.weight, tuple) else ((0, self.weight),)

    def weight_at(self, step: int) -> float:
        """The weight that holds at a step, without a ramp."""
        return [weight for first, weight in self.points if first <= step][-1]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Fim:
    """Fill-in-the-middle: pieces of rows turned into prefix, suffix and middle."""

    rate: NonNegativeFloat = 0.0
    """Share of the pieces that are transformed; 0: none."""
    spm_rate: NonNegativeFloat = 0.5
    """Share of the transformed pieces whose suffix comes before the prefix."""
    span: Literal["characters", "lines", "syntax"] = "characters"
    """Where a middle may begin and end: between any two characters, at lines, or around a whole node of the syntax."""
    level: Literal["context", "document"] = "context"
    """`context`: the pieces of a row, parts of documents among them. `document`: whole documents alone."""
    min_characters: PositiveInt = 16
    """A shorter piece is left as it is."""
    loss: Literal["all", "middle"] = "all"
    """Learn all tokens, or only middles and the end of text after them (for fine-tuning)."""
    file_rate: NonNegativeFloat = 0.5
    """Share of the files of a repository that is transformed (`data.unit = "repository"`)."""

    def __post_init__(self) -> None:
        for name in ("rate", "spm_rate", "file_rate"):
            value = getattr(self, name)
            require(value <= 1, f"data.fim.{name} = {value} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Curriculum:
    """Easy rows first, over the first steps of a run."""

    by: str = ""
    """What is difficult: `length` of the document, `compression` (what zlib cannot shorten), `loss` under another
    model (`scores`), or the name of a field of `.jsonl` rows; empty: no curriculum."""
    steps: NonNegativeInt = 0
    """Optimiser steps until every row may come."""
    start: float = 0.1
    """Share of the rows that may come at the first step, the easiest ones."""
    pace: Literal["linear", "square_root", "exponential", "steps"] = "square_root"
    """How the share grows to 1."""
    scores: str = ""
    """What `jaxlm data score` wrote, for `by = "loss"`."""

    def __post_init__(self) -> None:
        require(0 < self.start <= 1, f"data.curriculum.start = {self.start} must lie in (0, 1]")
        require(not self.by or self.steps > 0, f"data.curriculum.by = {self.by!r} needs data.curriculum.steps")
        require(self.by != "loss" or bool(self.scores), "data.curriculum.by = 'loss' needs data.curriculum.scores")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Repository:
    """Documents that are whole repositories."""

    without_name: NonNegativeFloat = 0.5
    """Share of the repositories whose name is left out."""

    def __post_init__(self) -> None:
        require(self.without_name <= 1, f"data.repository.without_name = {self.without_name} must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Data:
    """The corpus and the rows made of it."""

    source: str | tuple[str, ...] = "stdlib"
    """`"stdlib"` (the interpreter's, without its tests and tables), a file, a folder, a pattern such as
    `"texts/*.jsonl"`, or a Hugging Face dataset; or a list of these, read one after the other."""
    seq_len: PositiveInt = 256
    """Context length T, in tokens."""
    text_key: str = "text"
    """Field or column that holds the text in `.jsonl` and `.parquet`."""
    extensions: tuple[str, ...] = ()
    """Read only files with these endings from a folder, e.g. [".py", ".md"]; empty: every text file."""
    template: str = ""
    """The text of a row as a pattern over its fields, `"{question}\\n{answer}"`; empty: the field `text_key`."""
    row_files: tuple[str, ...] = ()
    """Endings of further files whose rows are documents: `.csv`, `.tsv`, `.json` (an array); else they are text."""
    max_bad_rows: NonNegativeInt = 100
    """How many rows may be no JSON, no UTF-8 or without a text: they are skipped and named; 0: none."""
    gitignore: bool = False
    """`source` is a git working tree: leave out what its `.gitignore` files name."""
    validation_fraction: float = 0.05
    """Share of the files (or of the documents of a single file) held out, chosen by a hash of the name."""
    validation_source: str = ""
    """A corpus of its own for validation; `validation_fraction` is then unused."""
    max_bytes: NonNegativeInt = 0
    """Stop reading the corpus after this many bytes; 0: all of it."""
    cache_dir: str = ".cache/jaxlm"
    """Where tokenised shards are kept, a folder for each fingerprint of corpus and tokenizer, and compiled programs."""
    workers: NonNegativeInt = 0
    """Threads that tokenise; 0: one a core."""
    prefetch: PositiveInt = 8
    """Batches prepared ahead of the step."""

    min_tokens: NonNegativeInt = 0
    """Leave out training documents of fewer tokens, for a stage of long texts; 0: none."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream`: documents end to end, cut every T tokens. `best_fit`: a document that fits into a row is never cut."""
    unit: Literal["document", "repository"] = "document"
    """`repository`: the files of a repository (a folder in `source`, or `source` itself) in one document."""
    mixture: tuple[MixtureSource, ...] = ()
    """Several corpora with a share each; `source` and `languages` are then unused."""
    languages: tuple[str, ...] = ()
    """Read only files of these languages, such as ["python", "shell"], by ending or first line; empty: all."""
    temperature: NonNegativeFloat = 0.0
    """Give each corpus of the mixture a share proportional to its tokens ^ (1 / temperature); 0: by `weight`."""
    weight_ramp: bool = False
    """Between two steps of a list of weights, go on a line instead of holding the former."""
    stop_with: str = ""
    """End the run when this corpus of the mixture has been read `max_epochs` times (once, where that is 0)."""
    fim: Fim = dataclasses.field(default_factory=Fim)
    curriculum: Curriculum = dataclasses.field(default_factory=Curriculum)
    repository: Repository = dataclasses.field(default_factory=Repository)

    def __post_init__(self) -> None:
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction = {self.validation_fraction} must lie in [0, 1)",
        )
        for ending in self.row_files:
            require(ending in (".csv", ".tsv", ".json"), f"data.row_files: {ending!r} is not .csv, .tsv or .json")
        names = [one.name for one in self.mixture]
        for name in names:
            require(names.count(name) == 1, f"data.mixture: two corpora have the name {name!r}")
        require(
            not self.stop_with or self.stop_with in names,
            f"data.stop_with = {self.stop_with!r} is no corpus of data.mixture: {', '.join(names) or 'it has none'}",
        )
        for step in sorted({step for one in self.mixture for step, _ in one.points}):
            require(
                any(one.weight_at(step) > 0 for one in self.mixture),
                f"data.mixture: all weights are 0 at step {step}",
            )
        require(
            not self.fim.rate or self.seq_len >= 2 * FEWEST_FOR_FIM,
            f"data.seq_len = {self.seq_len} leaves no room for fill-in-the-middle: {2 * FEWEST_FOR_FIM} or more do",
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a list."""
        return (self.source,) if isinstance(self.source, str) else self.source

    def check_steps(self, steps: int) -> None:
        """Refuse a schedule that goes on after the run.

        Raises:
            ValueError: a weight or the curriculum names a step after `steps`.
        """
        for one in self.mixture:
            last = one.points[-1][0]
            require(last < steps, f"data.mixture.{one.name}: a weight from step {last} on, train.steps = {steps}")
        require(
            self.curriculum.steps <= steps,
            f"data.curriculum.steps = {self.curriculum.steps} is more than train.steps = {steps}",
        )
