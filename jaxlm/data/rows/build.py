"""From `[data]` to the rows of a run: which packing, which middles, which order, which shares."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.config import Data, Fim
from jaxlm.data import repository
from jaxlm.data.fim import SLACK, FillIn, Marks, Spans, by_characters, by_lines
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.packing.whole_documents import BestFitRows
from jaxlm.data.rows.compose import FilledRows, RunRows, Source, SourceRows
from jaxlm.data.rows.difficulty import curriculum_of
from jaxlm.data.rows.kept import kept_beside
from jaxlm.data.rows.shares import Share, targets, temperature_weights, weight_stretches
from jaxlm.data.rows.spans import by_nodes
from jaxlm.data.shards import Part, Shard
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_SAMPLED = 64
"""Rows by which the tokens that carry loss are estimated where a plan cannot tell them."""


def run_rows(
    data: Data, parts: Sequence[Part], tokenizer: Tokenizer, *, batch_size: int, seed: int, history: Sequence[Any] = ()
) -> tuple[RunRows, list[Any]]:
    """The rows of a run, and the shares by which its corpora are mixed, for the checkpoint.

    Args:
        history: shares that the run has had before, as (first row, shares); they hold up to the next entry.

    Raises:
        UserError: the tokenizer has no marks, a corpus does not fill a row, or a curriculum lacks its scores.
    """
    packed = [source_rows(data, part.shards.train, tokenizer, seed, long_enough(data, part)) for part in parts]
    if not data.mixture:
        count = parts[0].shards.train.trained_tokens
        if count < data.seq_len:
            text = "warning: %d training tokens do not fill one row of %d (data.seq_len): the rest of it is padding"
            _log.warning(text, count, data.seq_len)
        order = curriculum_of(data, parts[0].shards.train, packed[0], None, 0, batch_size, seed, tokenizer)
        return RunRows([Source("", packed[0], order)]), []
    if not history:
        history = [(0, shares_of(data, parts, packed, batch_size))]
    (_, first), *changes = history
    stop_with = _stop_with(data)
    mixture = Mixture(targets(_shares(first), stop_with=stop_with))
    for row, shares in changes:
        mixture = mixture.then(int(row), _shares(shares), stop_with=stop_with)
    sources = []
    for i, (part, rows) in enumerate(zip(parts, packed, strict=True)):
        order = curriculum_of(data, part.shards.train, rows, mixture, i, batch_size, seed, tokenizer)
        sources.append(Source(part.name, rows, order))
    return RunRows(sources, mixture), list(history)


def _shares(plain: Sequence[Any]) -> list[Share]:
    """Shares from the lists of a checkpoint."""
    return [
        Share(
            tuple((int(row), float(weight)) for row, weight in weights), float(tokens), math.inf if cap is None else cap
        )
        for weights, tokens, cap in plain
    ]


def _stop_with(data: Data) -> int | None:
    return [one.name for one in data.mixture].index(data.stop_with) if data.stop_with else None


def source_rows(
    data: Data, shard: Shard, tokenizer: Tokenizer, seed: int, documents: np.ndarray | None = None
) -> SourceRows:
    """The rows of one corpus, packed and with middles as `[data]` says; of these documents alone, if given."""
    slack = SLACK * (4 if data.unit == "repository" else 1)
    options: dict[str, Any] = {"seed": seed, "pad": tokenizer.pad, "draw": data.fim.rate, "slack": slack}
    options["documents"] = documents
    if data.packing == "best_fit":
        remember = kept_beside(shard.folder)
        rows = BestFitRows(shard, data.seq_len, line_ends=line_ends(tokenizer), remember=remember, **options)
    else:
        rows = PackedRows(shard, data.seq_len, **options)
    return with_middles(data, rows, data.fim, tokenizer, seed, slack) if data.fim.rate else rows


def long_enough(data: Data, part: Part) -> np.ndarray | None:
    """The training documents that have `data.min_tokens`; None: all of them.

    Raises:
        UserError: there is none.
    """
    if not data.min_tokens:
        return None
    documents = np.flatnonzero(np.diff(part.shards.train.offsets) >= data.min_tokens)
    if not len(documents):
        where = f" of data.mixture.{part.name}" if part.name else ""
        raise UserError(f"data.min_tokens = {data.min_tokens}: no training document{where} is as long")
    return documents


def with_middles(
    data: Data, rows: SourceRows, fim: Fim, tokenizer: Tokenizer, seed: int, slack: int = SLACK
) -> FilledRows:
    """Packed rows whose drawn pieces are turned into fill-in-the-middle."""
    fill_in = FillIn(tokenizer, marks_of(tokenizer), spm_rate=fim.spm_rate, least=fim.min_characters)
    shard = rows.shard

    def spans_of(place: int) -> Spans:
        if fim.span == "syntax":
            return by_nodes(shard.language(shard.document_at(place)))
        return by_lines if fim.span == "lines" else by_characters

    return FilledRows(
        rows,
        fill_in,
        spans_of,
        seed=seed,
        slack=slack,
        begin_of_text=tokenizer.bos,
        middles_only=fim.loss == "middle",
        whole_only=fim.level == "document",
        separator=repository.marks_of(tokenizer).file if data.unit == "repository" else None,
        file_rate=fim.file_rate,
    )


def marks_of(tokenizer: Tokenizer) -> Marks:
    """The marks of a tokenizer.

    Raises:
        UserError: it has not all of them.
    """
    names = ("fim_prefix", "fim_suffix", "fim_middle", "eot")
    missing = [name for name in names if name not in tokenizer.specials]
    if missing:
        hint = "tokenizer.fim_marks = true adds them; tokenizer.specials = true gives them to one that is made here"
        raise UserError(f"data.fim: the tokenizer has no {', '.join(missing)}", hint)
    return Marks(*(tokenizer.special(name) for name in names))


def line_ends(tokenizer: Tokenizer) -> np.ndarray:
    """For each id, whether its text ends with a line end."""
    spelled = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    return np.array([part.endswith(b"\n") or part == b"<0x0A>" for part in spelled])


def shares_of(data: Data, parts: Sequence[Part], rows: Sequence[SourceRows], batch_size: int) -> list[Any]:
    """The shares of a mixture as plain lists: weights by row, tokens that carry loss in a row, rows at most.

    Raises:
        UserError: a corpus has fewer tokens than one row.
    """
    tokens = [part.shards.train.trained_tokens for part in parts]
    if data.temperature:
        by_size = temperature_weights(tokens, data.temperature)
    out = []
    for i, (source, packed, count) in enumerate(zip(data.mixture, rows, tokens, strict=True)):
        if count < data.seq_len:
            what = f"data.mixture.{source.name}: its {count} training tokens do not fill one row of {data.seq_len}"
            raise UserError(what, "give it more text, or a smaller data.seq_len")
        points = ((0, by_size[i]),) if data.temperature else source.points
        weights = weight_stretches(points, ramp=data.weight_ramp, unit=batch_size)
        per_row = row_tokens(packed)
        caps: list[int] = []
        if source.max_epochs or source.name == data.stop_with:
            caps.append(max(1, int((source.max_epochs or 1) * packed.rows_per_epoch)))
        if source.max_tokens:
            caps.append(max(1, round(source.max_tokens / per_row)))
        out.append([[list(point) for point in weights], per_row, min(caps, default=None)])
    return out


def row_tokens(rows: SourceRows) -> float:
    """Tokens that carry loss in a row, on average over an epoch: counted, or from a sample where pieces change."""
    if not isinstance(rows, FilledRows):
        return rows.shard.trained_tokens / rows.rows_per_epoch
    sample = np.unique(np.linspace(0, rows.rows_per_epoch - 1, _SAMPLED).astype(np.int64))
    return max(1.0, float(rows[sample].weights.sum(axis=1).mean()))
