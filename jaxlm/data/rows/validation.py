"""The held-out rows of a run: all of them, by corpus, by language, and their middles."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Data
from jaxlm.data.fim import SLACK
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.pipeline import Batch, Corpus, validation_batches
from jaxlm.data.rows.build import with_middles
from jaxlm.data.shards import Shard
from jaxlm.errors import UserError, did_you_mean

SEED = 0
"""Of the order of held-out rows, not the run's seed: runs that differ in it are judged on the same rows."""
FIM = "fim"
"""Name of the set of middles."""


class HeldOut(NamedTuple):
    """One set of held-out batches.

    Attributes:
        name: of the corpus or the language, or `fim`; empty for the only corpus of a run.
        in_total: whether the loss over all counts it; the others are parts of those once more.
        batches: makes them, from the first.
    """

    name: str
    in_total: bool
    batches: Callable[[], Iterator[Batch]]


def held_out_sets(
    data: Data,
    corpus: Corpus,
    *,
    batch_size: int,
    max_batches: int = 0,
    rows: np.ndarray | None = None,
    by_language: bool = False,
) -> list[HeldOut]:
    """The sets of a run, those with rows. Without new options there is one, that of `make_validation_batches`.

    Args:
        max_batches: of each set; 0: all.
        rows: those of each batch that this process makes; None: all.
        by_language: add a set for each language that the held-out documents have.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "max_batches": max_batches, "rows": rows}
    pad = corpus.tokenizer.pad

    def plain(name: str, in_total: bool, shard: Shard, documents: np.ndarray | None = None) -> HeldOut:
        packed = PackedRows(shard, data.seq_len, seed=SEED, pad=pad, documents=documents)
        return HeldOut(name, in_total, functools.partial(validation_batches, packed, **options))

    shards = [part.shards.validation for part in corpus.parts]
    sets = [
        plain(part.name, True, shard) for part, shard in zip(corpus.parts, shards, strict=True) if len(shard.tokens)
    ]
    if by_language:
        for shard in shards:
            languages = np.array([shard.language(i) for i in range(shard.documents)])
            for language in sorted({*languages.tolist()} - {"", *(one.name for one in sets)}):
                sets.append(plain(language, False, shard, np.flatnonzero(languages == language)))
    if data.fim.rate and sets:
        sets.append(_middles(data, corpus, shards, options))
    return sets


def _middles(data: Data, corpus: Corpus, shards: list[Shard], options: dict[str, Any]) -> HeldOut:
    """Every piece transformed, and the loss on middles alone: of the first corpus that has held-out documents."""
    fim = dataclasses.replace(data.fim, rate=1.0, loss="middle")
    slack = SLACK * (4 if data.unit == "repository" else 1)
    shard = next(shard for shard in shards if len(shard.tokens))
    packed = PackedRows(shard, data.seq_len, seed=SEED, pad=corpus.tokenizer.pad, draw=1.0, slack=slack)
    rows = with_middles(data, packed, fim, corpus.tokenizer, SEED, slack)
    return HeldOut(FIM, False, functools.partial(validation_batches, rows, **options))


def check_watch(watch: str, sets: Sequence[HeldOut]) -> None:
    """Refuse to go by the loss on a set that is not measured.

    Raises:
        UserError: no set has the name `watch`, which is not empty.
    """
    names = [one.name for one in sets if one.name]
    if watch and watch not in names:
        hint = did_you_mean(watch, names) if names else "only the loss over all is measured"
        raise UserError(f"eval.watch = {watch!r} is not measured", hint)


def measure(
    sets: Sequence[HeldOut], evaluate: Callable[[Iterator[Batch]], Mapping[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Sums of the objective over all held-out rows, and the loss of each named set that has weight, in nats a token."""
    total: dict[str, float] = collections.defaultdict(float)
    losses: dict[str, float] = {}
    for one in sets:
        sums = evaluate(one.batches())
        if one.in_total:
            for name, value in sums.items():
                total[name] += value
        if one.name and sums.get("weight"):
            losses[one.name] = sums["nll"] / sums["weight"]
    return dict(total), losses
