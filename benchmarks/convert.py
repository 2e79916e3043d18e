"""`jaxlm convert` of a 7B-shaped Llama in bfloat16 against `cp -r` of the same folder on the same disk.

The copy is `cp -r` and then `sync -f` of what it wrote, because a conversion too ends when everything is on the disk.
Before each, all pages of the files it reads are dropped from the page cache. The copy and the conversions take turns;
a conversion's rate is divided by that of the copy just before it. Peak memory is VmHWM of the whole process:
what `ru_maxrss` is, without that of the process which started it.

python -m benchmarks.convert            13.5 GB read and written again: needs 41 GB free in --folder
python -m benchmarks.convert --small    2.2 GB
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.asked import positive
from jaxlm import config
from jaxlm.convert.canonical import leaves
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.files import storage
from jaxlm.convert.rows import plan
from jaxlm.convert.write_model import SHARD_BYTES

SHAPES = {
    "7b": {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "d_ff": 11008},
    "1b": {"d_model": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "d_ff": 5632},
}
ALLOWED = 300e6
"""Bytes of memory besides two of the largest tensors."""

_RUN = """
import sys
from jaxlm.convert.write_model import convert
print(convert(*sys.argv[1:]), file=sys.stderr)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


class Values:
    """Parameters of a model as mapping of names: random bfloat16 cut from one block of noise."""

    def __init__(self, cfg: config.Model) -> None:
        self.leaves = leaves(cfg)
        self.noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype("bfloat16")

    def dtype(self, name: str) -> str:
        return "bfloat16"

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.leaves[name].shape
        first = abs(hash(name)) % len(self.noise)
        return np.resize(np.roll(self.noise, first), shape)


def write_model(folder: Path, shape: str) -> int:
    """A random Llama as a Hugging Face folder without a manifest; returns the bytes of its largest tensor."""
    cfg = config.Model(vocab_size=32000, max_seq_len=4096, tie_embeddings=False, **SHAPES[shape])
    family = FAMILIES["llama"]
    tensors = list(plan(Values(cfg), cfg, family.rows(cfg)))  # type: ignore[arg-type]
    files = {"config.json": json.dumps(family.config_to_hf(cfg, dtype="bfloat16"))}
    storage.write_folder(folder, tensors, files, layout="llama", shard_bytes=SHARD_BYTES)
    (folder / storage.MANIFEST).unlink()
    return max(tensor.nbytes for tensor in tensors)


def cold(folder: Path) -> int:
    """Drop every page of the files of a folder; returns their bytes."""
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size += path.stat().st_size
    return size


def copied(src: Path, dst: Path) -> tuple[float, int]:
    """Seconds of `cp -r`, with everything on the disk in the end."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", src, dst], check=True)
    subprocess.run(["sync", "-f", dst], check=True)
    return time.perf_counter() - start, 0


def converted(src: Path, dst: Path, to: str) -> tuple[float, int]:
    """Seconds of a conversion in a process of its own, its start included, and its peak memory."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _RUN, src, dst, to], check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - start, int(done.stdout)


def measure(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Conversions out of `folder/hf` and back, each after a copy of what it reads."""
    for number in range(rounds):
        for src, to in (("hf", "torch"), ("hf", "jaxlm"), ("torch", "llama")):
            size = cold(folder / src)
            copy_s, _ = copied(folder / src, folder / "copy")
            shutil.rmtree(folder / "copy")
            os.sync()
            cold(folder / src)
            seconds, peak = converted(folder / src, folder / to, to)
            row = {
                "round": number,
                "from": "llama" if src == "hf" else src,
                "to": to,
                "bytes": size,
                "copy_s": copy_s,
                "seconds": seconds,
                "share_of_copy": copy_s / seconds,
                "peak_bytes": peak,
            }
            if to != "torch":
                shutil.rmtree(folder / to)
            os.sync()
            print(
                f"{row['from']:5} -> {to:5}  {seconds:6.1f} s {size / 1e9 / seconds:5.2f} GB/s   "
                f"cp -r and sync {copy_s:6.1f} s {size / 1e9 / copy_s:5.2f} GB/s   share {copy_s / seconds:4.0%}   "
                f"peak {peak / 1e6:,.0f} MB",
                flush=True,
            )
            yield row
        shutil.rmtree(folder / "torch")


def run(shape: str, folder: Path, rounds: int, out: Path | None) -> None:
    """Measure, print, write the JSON, leave nothing else behind."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        largest = write_model(Path(name) / "hf", shape)
        rows = list(measure(Path(name), rounds))
    allowed = 2 * largest + ALLOWED
    pairs = dict.fromkeys(f"{row['from']} -> {row['to']}" for row in rows)
    shares = {
        pair: statistics.median(row["share_of_copy"] for row in rows if f"{row['from']} -> {row['to']}" == pair)
        for pair in pairs
    }
    peak = max(row["peak_bytes"] for row in rows)
    for pair, share in shares.items():
        print(f"{pair:15} median {share:.0%} of the copy's throughput (asked: 60%)")
    print(
        f"peak {peak / 1e6:,.0f} MB, allowed {allowed / 1e6:,.0f} MB: two tensors of {largest / 1e6:,.0f} MB and 300 MB"
    )
    results = {"shape": shape, "largest_bytes": largest, "allowed_bytes": allowed, "peak_bytes": peak}
    peers.save("convert", {**results, "median_share_of_copy": shares, "rows": rows}, out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--small", action="store_true", help="1.1 billion parameters instead of 6.7")
    parser.add_argument("--rounds", type=positive, default=3, help="times that each conversion is measured")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/convert.json")
    arguments = parser.parse_args()
    run("1b" if arguments.small else "7b", arguments.folder, arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
