"""Training step of a 1.3B dense model on one GPU, bfloat16, rows of 4096 tokens: MFU against the peak measured here.

python -m benchmarks.gpu
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.asked import positive
from jaxlm import config
from jaxlm.recipes import make_recipe
from jaxlm.train.engine import JaxEngine

LENGTH = 4096


def make_config(rows: int) -> config.Config:
    """1.3B parameters. AdamW state is 16 GB; remat and blocks of the loss keep the step below 80 GB."""
    return config.Config(
        model=config.Model(
            vocab_size=32768, d_model=2048, n_layers=24, n_heads=16, n_kv_heads=16, d_ff=5504, remat="dots"
        ),
        data=config.Data(seq_len=LENGTH, cache_dir=tempfile.mkdtemp(prefix="jaxlm-benchmark-")),
        train=config.Train(batch_size=rows, learning_rate=1e-4, loss_block=4096),
        numerics=config.Numerics(compute="bfloat16"),
    )


def packed_batch(rows: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Random ids, four documents a row."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    place = np.arange(LENGTH, dtype=np.int32)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.tile(place % (LENGTH // 4), (rows, 1)),
        "segments": np.tile(place // (LENGTH // 4) + 1, (rows, 1)),
        "weights": np.ones((rows, LENGTH), np.float32),
    }


def peak_flops(size: int = 8192, tries: int = 10) -> float:
    """FLOP/s of the best of a few bfloat16 matrix products."""
    x, product = jnp.ones((size, size), jnp.bfloat16), jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rows", type=positive, default=4, help="rows of 4096 tokens in a step")
    parser.add_argument("--steps", type=positive, default=12, help="steps to time")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/gpu.json")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        parser.exit(2, f"no GPU: JAX sees {device.device_kind}\n")
    peak, cfg = peak_flops(), make_config(arguments.rows)
    engine = JaxEngine(cfg, make_recipe(cfg), lambda *_: [])
    batch = packed_batch(arguments.rows, cfg.model.vocab_size)
    seconds = []
    for _ in range(arguments.steps + 2):
        start = time.perf_counter()
        loss = engine.fetch([engine.step(batch)])[0]["loss"]
        seconds.append(time.perf_counter() - start)
    first, timed = seconds[0], seconds[2:]
    tokens_per_s = arguments.rows * LENGTH / statistics.median(timed)
    mfu = tokens_per_s * engine.flops_per_token / peak
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(f"{device.device_kind}: {tokens_per_s:,.0f} tokens/s, MFU {mfu:.1%} of {peak / 1e12:.0f} TFLOP/s measured")
    print(f"step {statistics.median(timed):.3f} s, first {first:.1f} s, memory {memory / 1e9:.1f} GB, loss {loss:.3f}")
    results = {
        "device": device.device_kind,
        "rows": arguments.rows,
        "tokens_per_s": tokens_per_s,
        "mfu": mfu,
        "peak_flops": peak,
        "flops_per_token": engine.flops_per_token,
        "first_s": first,
        "seconds": timed,
        "peak_bytes": memory,
    }
    peers.save("gpu", results, arguments.out)


if __name__ == "__main__":
    main()
