"""How long XLA takes to compile the training step of 6 and of 48 layers: a scan over the pattern compiles one repeat.

python -m benchmarks.compile_time
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.asked import positive

PATTERNS = {
    "dense": ("attention+mlp",),
    "moe": ("attention+moe",),
    "mamba": ("mamba",),
    "mamba2": ("mamba2",),
    "hybrid": ("mamba+mlp", "attention+mlp"),
}
DEPTHS = (6, 48)


def child(name: str, depth: int) -> None:
    """Trace and compile one step in this process, without any cache, and print the seconds."""
    import jax
    import jax.numpy as jnp

    from jaxlm import config
    from jaxlm.models.decoder import Decoder, init_params
    from jaxlm.recipes.pretrain import loss_fn
    from jaxlm.train.optim import make_optimizer
    from jaxlm.train.step import init_state, make_step

    model = config.Model(
        pattern=PATTERNS[name],
        vocab_size=1024,
        d_model=128,
        n_layers=depth,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=256,
        moe=config.MoE(d_ff=128),
        mamba=config.Mamba(head_dim=32, d_state=16),
    )
    train, decoder = config.Train(batch_size=4), Decoder(model)
    optimizer = make_optimizer(train)
    state = jax.eval_shape(lambda key: init_state(init_params(decoder, key), optimizer), jax.random.key(0))
    row = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments"), row)
    batch["weights"] = jax.ShapeDtypeStruct((4, 256), jnp.float32)
    step = jax.jit(make_step(loss_fn(decoder, train), optimizer, train, seed=0), donate_argnums=0)
    start = time.perf_counter()
    lowered = step.lower(state, batch)
    traced = time.perf_counter()
    lowered.compile()
    print(json.dumps({"trace_s": traced - start, "compile_s": time.perf_counter() - traced}))


def run(rounds: int, out: Path | None = None) -> dict[str, Any]:
    """Compile all in turn, `rounds` times, print a table, write the JSON."""
    seconds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in PATTERNS:
            for depth in DEPTHS:
                command = [sys.executable, "-m", "benchmarks.compile_time", "--child", name, "--depth", str(depth)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds.setdefault((name, depth), []).append(json.loads(done.stdout))
    found: dict[str, Any] = {}
    print(f"{'compile time':12} {'6 layers':>10} {'48 layers':>10} {'ratio':>6}")
    for name in PATTERNS:
        few, many = (
            statistics.median(one["trace_s"] + one["compile_s"] for one in seconds[name, depth]) for depth in DEPTHS
        )
        found[name] = {"6": seconds[name, 6], "48": seconds[name, 48], "ratio": many / few}
        print(f"{name:12} {few:9.1f}s {many:9.1f}s {many / few:6.2f}")
    peers.save("compile_time", {"rounds": rounds, "patterns": found}, out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/compile_time.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.depth)
    else:
        run(arguments.rounds, arguments.out)


if __name__ == "__main__":
    main()
