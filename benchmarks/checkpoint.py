"""What a checkpoint costs: the time that saving adds to training, and the time to resume.

    python -m benchmarks.checkpoint                                  110M parameters: saves, and resuming
    python -m benchmarks.checkpoint --model dense-1.04b --only resume --folder /data      needs 16 GB of memory

Steps with one save among them and steps without take turns. `blocked_s` is how long `save` holds the loop up; `added_s`
is all that a save adds, to its own steps and to those during which it is written. Resuming is timed in a fresh
process, from its start to the state on the device, checksums compared; the pages of the files may be in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import peers
from benchmarks.asked import positive

EVERY = 200  # steps between two checkpoints by default
MINUTES = 10.0


def engine(model: str, folder: str, rows: int, length: int) -> Any:
    """The engine of `jaxlm train MODEL`, for rows of `length` tokens, and a random batch for it."""
    import jax
    import numpy as np

    from jaxlm.config import toml
    from jaxlm.recipes import make_recipe
    from jaxlm.train.engine import JaxEngine

    options = [f'out_dir="{folder}"', f"train.batch_size={rows}", f"data.seq_len={length}", "model.dropout=0.0"]
    cfg = toml.load(model, [*options, f'data.cache_dir="{folder}/cache"'])
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (rows, length + 1)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "segments": np.ones((rows, length), np.int32),
        "weights": np.ones((rows, length), np.float32),
    }
    made = JaxEngine(cfg, make_recipe(cfg), lambda *_: [])
    return made, batch, sum(leaf.size for leaf in jax.tree.leaves(made.state.params)) if length > 1 else 0


def saving(model: str, folder: str, rows: int, length: int, steps: int, rounds: int) -> dict[str, Any]:
    """Blocks of `steps` steps, with and without a save after the first of them, in turn."""
    import jax

    made, batch, parameters = engine(model, folder, rows, length)

    def block(save: bool) -> tuple[float, float]:
        begun, blocked = time.perf_counter(), 0.0
        for index in range(steps):
            made.fetch([made.step(batch)])
            if save and index == 0:
                before = time.perf_counter()
                made.save({}, None)
                blocked = time.perf_counter() - before
        made.checkpointer.wait()
        return time.perf_counter() - begun, blocked

    block(True)  # compiles
    plain, saved, blocked = [], [], []
    for _ in range(rounds):
        plain.append(block(False)[0])
        seconds, held = block(True)
        saved.append(seconds)
        blocked.append(held)
    made.close()
    step, added = statistics.median(plain) / steps, statistics.median(saved) - statistics.median(plain)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made.state))
    return {
        "parameters": parameters,
        "state_bytes": size,
        "step_s": step,
        "blocked_s": statistics.median(blocked),
        "added_s": added,
        f"share_every_{EVERY}_steps": added / (EVERY * step),
        f"share_every_{MINUTES:g}_minutes": added / (60 * MINUTES),
        "blocks": {"steps": steps, "plain_s": plain, "saved_s": saved, "blocked_s": blocked},
    }


def write(model: str, folder: str) -> dict[str, Any]:
    """Save a state of random numbers, for `resume`, on a machine whose memory does not hold it twice."""
    import functools

    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointHandler = functools.partial(ocp.PyTreeCheckpointHandler, save_device_host_concurrent_gb=2)
    made, _, parameters = engine(model, folder, 1, 2)
    random = np.random.default_rng(0)

    def noise(leaf: Any) -> Any:
        drawn = random.standard_normal(leaf.shape, np.float32) if leaf.ndim else np.asarray(leaf)
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    leaves, tree = jax.tree.flatten(made.state)
    made.state = None
    for index, leaf in enumerate(leaves):
        leaves[index] = noise(leaf)
    made.state = jax.tree.unflatten(tree, leaves)
    begun = time.perf_counter()
    made.save({}, None)
    made.close()
    return {"parameters": parameters, "save_s": time.perf_counter() - begun, "peak_bytes": peers.peak_memory()}


def resume(model: str, folder: str, started: float) -> dict[str, Any]:
    """Restore in this process, which was `started` at this time."""
    import jax

    made, _, _ = engine(model, folder, 1, 1)
    begun = time.time()
    made.restore(print)
    jax.block_until_ready(made.state)
    ended = time.time()
    return {"restore_s": ended - begun, "process_s": ended - started, "peak_bytes": peers.peak_memory()}


def in_process(*words: str) -> dict[str, Any]:
    """The result of a mode in a process of its own, timed from its start."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", *words, "--started", str(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense-110m", help="a name of configs/models")
    parser.add_argument("--only", choices=("saving", "resume"), help="one of the two parts")
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--rows", type=positive, default=1, help="of a batch")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a row")
    parser.add_argument("--steps", type=positive, default=8, help="of a block")
    parser.add_argument("--rounds", type=positive, default=5, help="blocks of each kind")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sizes = (args.rows, args.length, args.steps, args.rounds) if args.child == "saving" else ()
        sizes = (args.started,) if args.child == "resume" else sizes
        measure: Any = {"saving": saving, "write": write, "resume": resume}[args.child]
        print(json.dumps(measure(args.model, args.folder, *sizes)))
        return
    found: dict[str, Any] = {"model": args.model}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        common = ("--model", args.model, "--rows", str(args.rows), "--length", str(args.length))
        counts = ("--steps", str(args.steps), "--rounds", str(args.rounds))
        if args.only != "resume":
            found["saving"] = in_process("--child", "saving", "--folder", f"{folder}/a", *common, *counts)
        if args.only != "saving":
            found["written"] = in_process("--child", "write", "--folder", f"{folder}/b", *common)
            found["resumed"] = in_process("--child", "resume", "--folder", f"{folder}/b", *common)
    print(json.dumps(found, indent=1))
    peers.save("checkpoint", found, peers.RESULTS / f"checkpoint-{args.model}.json")


if __name__ == "__main__":
    main()
