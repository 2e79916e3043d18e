"""How fast rows are made, what a far step costs, and what best fit saves.

python -m benchmarks.data rows

Times are of the process, in seconds of one core; the figures are in tokens for one such second.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import toml
from jaxlm.data.packing.stream import PackedRows
from jaxlm.data.packing.whole_documents import BestFitRows
from jaxlm.data.pipeline import make_train_iterator, prepare
from jaxlm.data.rows.build import line_ends, source_rows
from jaxlm.data.rows.compose import SourceRows
from jaxlm.data.shards import Shard

BATCH = 8
RESULTS = Path(__file__).parent / "results" / "data_rows.json"


def seconds(work: Callable[[], Any]) -> float:
    """Process seconds of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def speed(rows: SourceRows, batches: int) -> float:
    """Millions of tokens for a second of one core."""
    rows[np.arange(BATCH)]  # the plan of the epoch is made here
    spent = seconds(lambda: [rows[BATCH * i + np.arange(BATCH)] for i in range(batches)])
    return batches * BATCH * rows.seq_len / spent / 1e6


def row_speeds(cache: str, seq_len: int, batches: int) -> dict[str, float]:
    """Rows of the standard library with and without middles and best fit."""
    out = {}
    for name, options in (
        ("stream", {}),
        ("best_fit", {"packing": "best_fit"}),
        ("stream, fim 0.5", {"fim": {"rate": 0.5}}),
        ("best_fit, fim 0.5", {"packing": "best_fit", "fim": {"rate": 0.5}}),
    ):
        cfg = toml.from_dict({"data": {"cache_dir": cache, "seq_len": seq_len, **options}})
        corpus = prepare(cfg)
        rows = source_rows(cfg.data, corpus.train, corpus.tokenizer, 0)
        out[name] = max(speed(rows, batches) for _ in range(3))
    return out


def far_step(cache: str, folder: Path) -> dict[str, float]:
    """Seconds until the first batch at step 0 and at step a million, with all parts on."""
    sources = []
    for i in range(5):
        path = folder / f"s{i}.txt"
        path.write_text(f"one line of source {i}, with some words\n" * 4000)
        sources.append({"name": f"s{i}", "source": str(path), "weight": 1 + i})
    data = {"cache_dir": cache, "seq_len": 256, "packing": "best_fit", "mixture": sources, "fim": {"rate": 0.5}}
    data["curriculum"] = {"by": "length", "steps": 100}
    tree = {"data": data, "tokenizer": {"kind": "bytes"}, "train": {"steps": 2_000_000, "batch_size": BATCH}}
    cfg = toml.from_dict(tree)
    corpus = prepare(cfg)

    def first_batch(step: int) -> None:
        iterator = make_train_iterator(cfg.data, corpus, batch_size=BATCH, seed=0)
        state = iterator.get_state()
        iterator.set_state({**state, "next_index": step})
        next(iterator)

    first_batch(0)
    # The epochs differ, so that the plan of neither is on disk at the first try.
    times = {step: [seconds(functools.partial(first_batch, step + i)) for i in range(5)] for step in (0, 10**6)}
    near, far = (float(np.median(times[step])) for step in (0, 10**6))
    return {"step 0": near, "step 1,000,000": far, "ratio": far / near}


def best_fit_figures(cache: str) -> dict[str, dict[str, float]]:
    """What best fit and the stream do to documents that fit, on the standard library."""
    out = {}
    for seq_len in (256, 1024, 2048, 8192):
        corpus = prepare(toml.from_dict({"data": {"cache_dir": cache, "seq_len": seq_len}}))
        shard = corpus.train
        fit = BestFitRows(shard, seq_len, line_ends=line_ends(corpus.tokenizer))
        offsets = np.asarray(shard.offsets)
        fitting = np.flatnonzero(np.diff(offsets) <= seq_len)
        wanted = set(zip(offsets[fitting].tolist(), offsets[fitting + 1].tolist(), strict=True))
        packed = {"cut by best fit": fit, "cut by stream": PackedRows(shard, seq_len)}
        padding = 100 * (1 - len(shard.tokens) / (fit.rows_per_epoch * seq_len))
        cut = {name: len(wanted - whole_pieces(rows)) for name, rows in packed.items()}
        out[str(seq_len)] = {"documents that fit": len(wanted), **cut, "padding %": padding}
    return out


def whole_pieces(rows: SourceRows) -> set[tuple[int, int]]:
    """Begin and end of all pieces of epoch 0."""
    pieces = [rows.pieces(i) for i in range(rows.rows_per_epoch)]
    return {(b, e) for piece in pieces for b, e in zip(piece.begins.tolist(), piece.ends.tolist(), strict=True)}


def plan_of_a_million() -> float:
    """Seconds of the plan of a million documents."""
    sizes = np.random.default_rng(0).lognormal(6, 1.2, 10**6).astype(int).clip(1, 2048)
    shard = Shard(np.zeros(int(sizes.sum()), np.uint8), np.cumsum([0, *sizes]), 0)
    rows = BestFitRows(shard, 2048)
    return seconds(lambda: rows.pieces(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rows"])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[2048, 256, 64])
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--cache", default=".cache/jaxlm")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}",
            "million tokens a CPU-second": {
                str(seq_len): row_speeds(args.cache, seq_len, args.batches * max(1, 512 // seq_len))
                for seq_len in args.seq_len
            },
            "first batch, CPU-seconds": far_step(folder, Path(folder)),
            "best fit": best_fit_figures(args.cache),
            "plan of a million documents, CPU-seconds": plan_of_a_million(),
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
