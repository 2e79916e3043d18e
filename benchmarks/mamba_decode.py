"""What a decoding step costs on the CPU after 100 and after 100,000 tokens: a state does not grow, keys and values do.

python -m benchmarks.mamba_decode

The cache of the attention model has room for the text so far; the steps of all models take turns.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import peers, train_step
from benchmarks.asked import positive

PATTERNS = {"mamba": ("mamba",), "mamba2": ("mamba2",), "attention": ("attention+mlp",)}
LENGTHS = (100, 100_000)


def stepper(pattern: tuple[str, ...], length: int) -> Any:
    """A compiled step of one row after `length` tokens, and bytes of its cache."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from jaxlm.models.decoder import Decoder, init_cache, init_params

    decoder = Decoder(dataclasses.replace(train_step.jaxlm_model(), pattern=pattern))
    params = init_params(decoder, jax.random.key(0))
    cache = jax.jit(lambda: init_cache(decoder, 1, length + 64))()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params: Any, cache: Any) -> Any:
        one = jnp.ones((1, 1), jnp.int32)
        logits, cache = decoder.apply({"params": params}, one, length * one, one, cache)
        return logits, cache

    state = {"cache": cache}

    def run() -> None:
        logits, state["cache"] = step(params, state["cache"])
        logits.block_until_ready()

    run()
    return run, size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mamba_decode", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=50, help="steps of each model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    steps = {(name, n): stepper(pattern, n) for name, pattern in PATTERNS.items() for n in LENGTHS}
    times: dict[Any, list[float]] = {key: [] for key in steps}
    for _ in range(arguments.rounds):
        for key, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - start)
    found: dict[str, Any] = {}
    for (name, n), seconds in times.items():
        size = steps[name, n][1]
        found[f"{name} at {n}"] = {"median_s": statistics.median(seconds), "min_s": min(seconds), "cache_bytes": size}
        print(
            f"{name:10} at {n:7,}: median {statistics.median(seconds) * 1e3:7.2f} ms  "
            f"least {min(seconds) * 1e3:7.2f} ms  cache {size / 1e6:8.2f} MB"
        )
    peers.save("mamba_decode", {"rounds": arguments.rounds, "steps": found}, arguments.out)


if __name__ == "__main__":
    main()
