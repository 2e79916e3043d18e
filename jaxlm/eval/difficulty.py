"""How hard each training document is for a model: the loss that a curriculum goes by (`data.curriculum.scores`).

    jaxlm data score configs/big.toml runs/small scores.npy

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm import config
from jaxlm.convert.open_model import load
from jaxlm.data.packing.pieces import Rows
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.pipeline import prepare
from jaxlm.data.rows.difficulty import shard_digest
from jaxlm.data.shards import Shard
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, Params
from jaxlm.numerics import Policy
from jaxlm.processes.compile_cache import enable_compilation_cache
from jaxlm.text.tokenizer import Tokenizer

ROWS = 8
"""Rows that go through the model at once."""


def score(cfg: config.Config, run: str | Path, out: str | Path) -> np.ndarray:
    """Write the loss of each training document of `cfg` under the model at `run`, in nats a token, and return it.

    The documents of a mixture follow each other in the order of its corpora. A document of one token has loss 0.

    Returns:
        float64 [documents], which is in `out`; a `.json` of the same name says to which tokens it belongs.

    Raises:
        UserError: there is no model or no tokenizer, or `out` is no name of a `.npy`.
    """
    if Path(out).suffix != ".npy":
        raise UserError(f"{out}: scores are kept as .npy", "name a .npy file")
    model = load(run)
    if model.tokenizer_path is None:
        raise UserError(f"{run}: there is no tokenizer.json", "copy the one the model was trained with into it")
    tokenizer = Tokenizer.from_file(model.tokenizer_path)
    corpus = prepare(dataclasses.replace(cfg, model=model.config.model), tokenizer)
    enable_compilation_cache(cfg.data.cache_dir)
    decoder = Decoder(model.config.model.portable, Policy.from_config(model.config.numerics))
    shards = [part.shards.train for part in corpus.parts]
    params = jax.device_put(model.params)
    scores = np.concatenate([_of_shard(decoder, params, shard, cfg.data.seq_len, tokenizer.pad) for shard in shards])
    _write(Path(out), scores, shards, tokenizer, run)
    return scores


def _of_shard(decoder: Decoder, params: Params, shard: Shard, seq_len: int, pad: int) -> np.ndarray:
    """Mean loss of each document over all rows of one epoch, each row read once."""
    from rich.console import Console
    from rich.progress import track

    packed = PackedRows(shard, seq_len, pad=pad)
    sums, counts = np.zeros(shard.documents), np.zeros(shard.documents)
    console = Console(stderr=True)
    starts = range(0, packed.rows_per_epoch, ROWS)
    for first in track(starts, "scoring", console=console, transient=True, disable=not console.is_terminal):
        numbers = np.arange(first, first + ROWS)
        rows = packed.first_epoch(numbers)
        loss_BT = np.asarray(_losses(decoder, params, rows), np.float64)
        document_BT = np.zeros(rows.tokens.shape, np.int64)
        for i, number in enumerate(numbers[numbers < packed.rows_per_epoch]):
            pieces = packed.pieces(int(number))
            documents = np.searchsorted(shard.offsets, pieces.begins, side="right") - 1
            filled = np.repeat(documents, pieces.ends - pieces.begins)
            document_BT[i, : len(filled)] = filled
        np.add.at(sums, document_BT, loss_BT * rows.weights)
        np.add.at(counts, document_BT, rows.weights)
    return sums / np.maximum(counts, 1)


def _losses(decoder: Decoder, params: Params, rows: Rows) -> Float[Array, "b t"]:
    return _losses_of(decoder, params, rows.tokens, rows.targets, rows.positions, rows.segments)


@functools.partial(jax.jit, static_argnums=0)
def _losses_of(
    decoder: Decoder,
    params: Params,
    tokens_BT: Int[Array, "b t"],
    targets_BT: Int[Array, "b t"],
    positions_BT: Int[Array, "b t"],
    segments_BT: Int[Array, "b t"],
) -> Float[Array, "b t"]:
    applied: Any = decoder.apply({"params": params}, tokens_BT, positions_BT, segments_BT)
    logits_BTV = applied[0].astype(jnp.float32)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT


def _write(out: Path, scores: np.ndarray, shards: list[Shard], tokenizer: Tokenizer, run: str | Path) -> None:
    about = {
        "run": str(run),
        "tokenizer": tokenizer.fingerprint(),
        "corpora": [shard_digest(shard) for shard in shards],
        "documents": [shard.documents for shard in shards],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, scores, allow_pickle=False)
    out.with_suffix(".json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    os.replace(temporary, out)
