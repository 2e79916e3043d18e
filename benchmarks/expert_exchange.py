"""Experts on 8 virtual devices: what `all_to_all` and `gather` move, and how long they take, forward and backward.

32 experts of width 256, 4096 tokens of width 256, float32. `even`: every expert is as likely as any other. `skewed`:
the experts of one device are three times as likely, so that the all-to-all makes further rounds. Both exchanges take
turns in one process. Here a byte between devices costs a copy in memory, so times say what sorting, copying and
computing cost; bytes are what a network would carry.

python -m benchmarks.expert_exchange
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=600"  # a busy machine is no deadlock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import peers
from benchmarks.asked import positive
from jaxlm.ops.moe import exchange
from jaxlm.ops.moe import experts as moe
from jaxlm.plan.hlo.collectives import collectives
from jaxlm.plan.hlo.program import parse

DEVICES, TOKENS, WIDTH, FFN, EXPERTS = 8, 4096, 256, 256, 32
LOCAL = EXPERTS // DEVICES
KINDS = ("all_to_all", "gather")


def choices(top_k: int, skewed: bool) -> np.ndarray:
    """Different random experts of each token [T, K]."""
    popular = np.where(np.arange(EXPERTS) < LOCAL, np.log(3.0) if skewed else 0.0, 0.0)
    scores = np.random.default_rng(0).gumbel(size=(TOKENS, EXPERTS)) + popular
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)


def further_rounds(experts_TK: np.ndarray) -> int:
    """Rounds after the first that `all_to_all` makes for these choices."""
    pairs = [np.bincount(part.reshape(-1) // LOCAL).max() for part in np.split(experts_TK, DEVICES)]
    first, further = exchange.sizes(TOKENS // DEVICES, experts_TK.shape[1], devices=DEVICES, n_local=LOCAL)
    return int(max(0, -((first - max(pairs)) // further)))


def gradient(kind: str, mesh: jax.sharding.Mesh) -> Any:
    """The gradient of a layer of experts by its tokens, weights and parameters, jitted."""
    compute = functools.partial(moe.moe, activation="swiglu")
    send: Any = functools.partial(getattr(exchange, kind), compute, n_local=LOCAL, axis="expert")
    if kind == "all_to_all":
        send = functools.partial(send, together=("expert",))
    split = PartitionSpec("expert")
    run = jax.shard_map(send, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return jax.jit(jax.grad(lambda *arguments: jnp.sum(run(*arguments) ** 2), argnums=(0, 1, 3)))


def case(top_k: int, skewed: bool, steps: int) -> dict[str, Any]:
    """Bytes that one device sends and the median time of a step, for both exchanges."""
    mesh = jax.make_mesh((DEVICES,), ("expert",), axis_types=(AxisType.Auto,))
    random, experts = np.random.default_rng(1), choices(top_k, skewed)
    normal = lambda *shape: random.standard_normal(shape, np.float32)  # noqa: E731
    parameters = moe.Experts(normal(EXPERTS, WIDTH, FFN), normal(EXPERTS, WIDTH, FFN), normal(EXPERTS, FFN, WIDTH))
    arguments = (normal(TOKENS, WIDTH), random.random((TOKENS, top_k), np.float32), experts, parameters)
    arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec("expert")))
    steps_of, found = {}, {}
    for kind in KINDS:
        compiled = gradient(kind, mesh).lower(*arguments).compile()
        jax.block_until_ready(compiled(*arguments))
        rounds = further_rounds(experts) if kind == "all_to_all" else 0
        each = [
            (rounds if "while" in one.op_name else 1, one)
            for one in collectives(parse(compiled.as_text()), {"expert": DEVICES})
        ]
        moved = sum(times * one.moved for times, one in each)
        found[kind] = {
            "bytes": moved,
            "further_rounds": rounds,
            "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        }
        steps_of[kind] = compiled, []
    for _ in range(steps):
        for run, times in steps_of.values():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments))
            times.append(time.perf_counter() - start)
    for kind, (_, times) in steps_of.items():
        found[kind] |= {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}
    one, other = found["all_to_all"], found["gather"]
    ratios = {name: one[name] / other[name] for name in ("bytes", "temporaries", "median_s")}
    return {"top_k": top_k, "routing": "skewed" if skewed else "even", **found, "ratios": ratios}


def run(steps: int, out: Path | None = None) -> dict[str, Any]:
    """Measure all cases, print a table, write the JSON."""
    cases = [
        case(top_k, skewed, steps) for top_k, skewed in ((1, False), (2, False), (4, False), (8, False), (2, True))
    ]
    print("top_k routing  further    sent by one device      all_to_all over gather: bytes, temporaries, time")
    for one in cases:
        sent = "  ".join(f"{one[kind]['bytes'] / 1e6:6.2f} MB" for kind in KINDS)
        ratios = "  ".join(f"{ratio:5.2f}" for ratio in one["ratios"].values())
        print(f"{one['top_k']:5} {one['routing']:8} {one['all_to_all']['further_rounds']:7}    {sent}      {ratios}")
    results = {"steps": steps, "cases": cases}
    peers.save("expert_exchange", results, out)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expert_exchange", description=__doc__)
    parser.add_argument("--steps", type=positive, default=12, help="of each exchange")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/expert_exchange.json")
    arguments = parser.parse_args()
    run(arguments.steps, arguments.out)


if __name__ == "__main__":
    main()
