"""How difficult the rows of a corpus are, and the order in which a curriculum offers them."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np

from jaxlm.config import Data
from jaxlm.data.curriculum import PACES, Curriculum, groups
from jaxlm.data.mixture import Mixture
from jaxlm.data.rows.compose import SourceRows
from jaxlm.data.rows.kept import kept_beside
from jaxlm.data.shards import Shard
from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer


def curriculum_of(
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
    if options.by == "loss":
        read_scores(Path(options.scores), shard, tokenizer)  # refused also where the order is known already
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
