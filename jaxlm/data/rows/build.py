"""From `[data]` to the rows of a run: which packing, which middles, which order, which shares."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import Data, Fim
from jaxlm.data import repository
from jaxlm.data.best_fit import BestFitRows
from jaxlm.data.curriculum import PACES, Curriculum, groups
from jaxlm.data.fim import SLACK, FillIn, Marks, Spans, by_characters, by_lines
from jaxlm.data.mixture import Mixture
from jaxlm.data.packing import PackedRows
from jaxlm.data.rows.compose import FilledRows, RunRows, Source, SourceRows
from jaxlm.data.rows.shares import Share, targets, temperature_weights, weight_stretches
from jaxlm.data.rows.spans import by_nodes
from jaxlm.data.shards import Part, Shard, exclusive
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer

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
    packed = [source_rows(data, part.shards.train, tokenizer, seed) for part in parts]
    if not data.mixture:
        order = _curriculum(data, parts[0].shards.train, packed[0], None, 0, batch_size, seed, tokenizer)
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
        order = _curriculum(data, part.shards.train, rows, mixture, i, batch_size, seed, tokenizer)
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
        remember = kept_beside(shard.folder) if documents is None else None
        rows = BestFitRows(shard, data.seq_len, line_ends=line_ends(tokenizer), remember=remember, **options)
    else:
        rows = PackedRows(shard, data.seq_len, **options)
    return with_middles(data, rows, data.fim, tokenizer, seed, slack) if data.fim.rate else rows


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


def kept_beside(folder: Path | None) -> Callable[[str, Callable[[], np.ndarray]], np.ndarray] | None:
    """Keeps plans as `.npy` files in the folder of a shard; several processes make each of them once."""
    if folder is None:
        return None

    def remember(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        path = folder / "plans" / f"{name}.npy"
        if (kept := _read(path)) is not None:
            return kept
        with exclusive(path):
            if (kept := _read(path)) is not None:
                return kept
            made = make()
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, made, allow_pickle=False)
            temporary.replace(path)
            return made

    return remember


def _read(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


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


def _curriculum(
    data: Data,
    shard: Shard,
    rows: SourceRows,
    mixture: Mixture | None,
    source: int,
    batch_size: int,
    seed: int,
    tokenizer: Tokenizer,
) -> Curriculum | None:
    """The order of the draws of one source; None: as the packing has them."""
    options = data.curriculum
    if not options.by:
        return None
    first_steps, pools = groups(options.steps, PACES[options.pace](options.start), rows.rows_per_epoch)
    starts = np.append(first_steps, options.steps) * batch_size
    if mixture is not None:
        starts = np.array([int(mixture.counts(int(min(row, mixture.end)))[source]) for row in starts])

    def by_row() -> np.ndarray:
        of_document = document_difficulty(data, shard, tokenizer)
        out = np.zeros(rows.rows_per_epoch)
        for row in range(rows.rows_per_epoch):
            pieces = rows.pieces(row)
            lengths = pieces.ends - pieces.begins
            documents = np.searchsorted(shard.offsets, pieces.begins, side="right") - 1
            out[row] = np.average(of_document[documents], weights=lengths) if lengths.sum() else 0.0
        return out

    packing = [data.packing, data.seq_len, seed, data.fim.rate, data.unit, options.by, _scores_digest(options.scores)]
    digest = hashlib.sha256(json.dumps(packing).encode()).hexdigest()[:16]
    remember = kept_beside(shard.folder)
    difficulty = remember(f"difficulty-{digest}", by_row) if remember else by_row()
    return Curriculum(difficulty, starts, pools, seed + source)


def _scores_digest(scores: str) -> str:
    path = Path(scores)
    return hashlib.sha256(path.read_bytes()).hexdigest() if scores and path.is_file() else scores


def document_difficulty(data: Data, shard: Shard, tokenizer: Tokenizer) -> np.ndarray:
    """Difficulty of each document of a shard, float64 [documents].

    Raises:
        UserError: there are no scores, or they are of another corpus or tokenizer.
    """
    by = data.curriculum.by
    if by == "length":
        return np.diff(shard.offsets).astype(np.float64)
    if by == "loss":
        return read_scores(Path(data.curriculum.scores), shard, tokenizer)
    if by == "compression":
        out = np.zeros(shard.documents)
        for i in range(shard.documents):
            text = tokenizer.decode(shard.tokens[shard.offsets[i] : shard.offsets[i + 1]].tolist()).encode()
            out[i] = len(zlib.compress(text, 6)) / max(1, len(text))
        return out
    if (values := shard.values) is None:
        raise UserError(
            f"data.curriculum.by = {by!r}: the corpus has no such field", "it must be a field of .jsonl rows"
        )
    return values


def read_scores(path: Path, shard: Shard, tokenizer: Tokenizer) -> np.ndarray:
    """The losses that `jaxlm data score` wrote, for this shard.

    Raises:
        UserError: the file is missing or damaged, or belongs to another corpus or tokenizer.
    """
    try:
        kept = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        scores = np.load(path, allow_pickle=False)
        tokenizer_then, digests = kept["tokenizer"], kept["corpora"]
        counts = [int(count) for count in kept["documents"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of scores: {error}", "jaxlm data score CONFIG RUN OUT.npy") from None
    again = f"jaxlm data score CONFIG RUN {path}"
    if tokenizer_then != tokenizer.fingerprint():
        raise UserError(f"{path}: the scores are of another tokenizer", again)
    if (digest := shard_digest(shard)) not in digests:
        raise UserError(f"{path}: the scores are of another corpus", again)
    number = digests.index(digest)
    first = sum(counts[:number])
    return np.asarray(scores[first : first + counts[number]], np.float64)


def shard_digest(shard: Shard) -> str:
    """sha256 (hex) of where the documents of a shard begin, and of some of its tokens."""
    sample = np.asarray(shard.tokens[:: max(1, len(shard.tokens) // 4096)])
    return hashlib.sha256(np.asarray(shard.offsets).tobytes() + sample.tobytes()).hexdigest()
