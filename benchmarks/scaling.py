"""Weak scaling over virtual devices and processes of this machine, and what each collective moves.

python -m benchmarks.scaling            JSON into results/, the plot into docs/scaling.png

Every run is `jaxlm launch local`: one process with 1, 2, 4, 8 virtual devices, and 1, 2, 4 processes with one each, the
same rows for each device. All share the cores, so where they are all busy already, n devices take n times as long: the
figure to look at is the tokens per second of the whole machine, which parallelism should leave as it is. On a machine
with GPUs (`--gpus`) each device has its own.

The traffic is read from the compiled step and held against `predicted`, which knows the mesh and the shapes alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.asked import positive

ROWS, LENGTH = 8, 256
"""Of each device."""
DEVICES, PROCESSES = (1, 2, 4, 8), (1, 2, 4)
MESHES = {"data": ("data",), "fsdp": ("fsdp",), "tensor": ("tensor",), "data x tensor": ("data", "tensor")}
PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"
OVERRIDES = (
    "model.layer_loop=scan",
    "model.d_model=192",
    "model.n_heads=8",  # so that tensor may split them
    "model.n_kv_heads=8",
    f"data.seq_len={LENGTH}",
    "log.every=1",
    "eval.every=0",
    "eval.batches=1",
    "checkpoint.every=0",
    "sample.prompts=[]",
)


def config_of(sizes: dict[str, int]) -> Any:
    """The quickstart on a mesh with these axes, `ROWS` rows for each device that splits the batch."""
    from jaxlm.config import toml

    rows = ROWS * sizes.get("data", 1) * sizes.get("fsdp", 1)
    mesh = [f"mesh.{axis}={size}" for axis, size in ({"data": 1} | sizes).items()]
    cfg = toml.load("configs/quickstart.toml", [*OVERRIDES, *mesh, f"train.batch_size={rows}"])
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=cfg.tokenizer.vocab_size))


def predicted(cfg: Any, sizes: dict[str, int]) -> dict[str, int]:
    """Bytes that one device sends along each axis in one step of a dense model in float32, by the best algorithms.

    A sum over n devices sends 2 (n - 1) / n of the array, a gather n - 1 times what a device holds.

    - data: one sum of all gradients.
    - fsdp: the layers' parameters gathered in the forward pass and again in the backward pass, the tables once;
      gradients summed. XLA's CPU compiler sums whole gradients where a reduce-scatter would do with half.
    - tensor: outputs of attention and feed-forward summed in the forward pass; in the backward pass the gradients of
      their inputs, once for each of the five kernels that read one (other compilers add those of one input first); the
      looked-up embeddings and the gradient of the head's input.

    A tied embedding has two gradients, of the head and of the table, each summed by itself.
    """
    from jaxlm.counts.parameters import account

    model, width = cfg.model, 4
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    norms = (2 * model.n_layers + 1) * model.d_model
    split = account(cfg).total - norms
    tables = model.vocab_size * model.d_model
    gradients = split + (tables if model.tie_embeddings else 0)
    layers = gradients - 2 * tables
    held = width * (gradients / tensor + norms)
    activations = width * cfg.train.batch_size // (data * fsdp) * cfg.data.seq_len * model.d_model
    sums = lambda n, size: 2 * (n - 1) / n * size  # noqa: E731
    found = {
        "data": sums(data, held / fsdp),
        "fsdp": (fsdp - 1) / fsdp * width * (gradients + layers) / tensor + sums(fsdp, held),
        "tensor": sums(tensor, activations) * (7 * model.n_layers + 2),
    }
    return {axis: round(found[axis]) for axis in found if sizes.get(axis, 1) > 1}


def traffic(sizes: dict[str, int]) -> dict[str, Any]:
    """What the collectives of the compiled step move, by kind and axis, beside what was predicted."""
    from jaxlm.mesh import Layout
    from jaxlm.plan.hlo import program as hlo
    from jaxlm.plan.hlo.collectives import collectives, moved_by
    from jaxlm.recipes import make_recipe
    from jaxlm.train.program import abstract_inputs, training_program

    cfg = config_of(sizes)
    layout = Layout.from_config(cfg.mesh)
    program = training_program(cfg, layout, make_recipe(cfg))
    compiled = program.step.lower(*abstract_inputs(cfg, layout, program)).compile()
    moved = moved_by(collectives(hlo.parse(compiled.as_text()), layout.mesh.shape))
    by_axis: dict[str, int] = {}
    for (_, axes), size in moved.items():
        by_axis["+".join(axes)] = by_axis.get("+".join(axes), 0) + size
    kinds = {f"{kind} over {'+'.join(axes)}": size for (kind, axes), size in moved.items()}
    return {"mesh": sizes, "moved": by_axis, "predicted": predicted(cfg, sizes), "kinds": kinds}


def in_own_process(sizes: dict[str, int]) -> dict[str, Any]:
    """`traffic` where there are as many virtual devices as the mesh needs."""
    count = 1
    for size in sizes.values():
        count *= size
    flags = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-m", "benchmarks.scaling", "--traffic", json.dumps(sizes)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of_a_step(folder: Path, processes: int, devices: int, steps: int, mesh: str, virtual: bool) -> float:
    """Median of the steps of a run, without the first two."""
    out = folder / f"{processes}-{devices}-{mesh}-{len(list(folder.iterdir()))}"
    count = processes * devices
    command = [sys.executable, "-m", "jaxlm", "launch", "local", "--processes", str(processes)]
    command += ["--devices-per-process", str(devices if virtual else 0), "--", "train", "configs/quickstart.toml"]
    command += [*OVERRIDES, f"train.steps={steps}", f"train.batch_size={ROWS * count}", f"out_dir={out}"]
    subprocess.run([*command, "mesh.data=1", f"mesh.{mesh}={count}"], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(row["step_seconds"] for row in rows if "step_seconds" in row and row["step"] > 2)


def measure(steps: int, rounds: int, gpus: int) -> list[dict[str, Any]]:
    """All runs, taking turns."""
    virtual = not gpus
    kinds = [(1, n, mesh) for n in DEVICES for mesh in ("data", "fsdp") if n > 1 or mesh == "data"]
    kinds += [(n, 1, "data") for n in PROCESSES[1:]]
    if gpus:
        kinds = [(1, n, mesh) for n in range(1, gpus + 1) if gpus % n == 0 for mesh in ("data", "fsdp")]
    times: dict[Any, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for processes, devices, mesh in kinds:
                seconds = seconds_of_a_step(Path(folder), processes, devices, steps, mesh, virtual)
                times[processes, devices, mesh].append(seconds)
                print(f"{processes} processes x {devices} devices, {mesh}: {seconds:.3f} s a step", flush=True)
    one = statistics.median(times[1, 1, "data"])
    rows = []
    for (processes, devices, mesh), seconds in times.items():
        count, median = processes * devices, statistics.median(seconds)
        tokens = ROWS * LENGTH * count / median
        share = one * count / median if virtual else one / median
        sizes = {"processes": processes, "devices": devices, "mesh": mesh, "step_seconds": seconds}
        rows.append({**sizes, "tokens_per_second": tokens, "of_one_device": share})
    return rows


def plot(rows: list[dict[str, Any]], moved: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second of the machine against devices, and traffic against its prediction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=144)
    series = {
        "devices of one process, data": [row for row in rows if row["processes"] == 1 and row["mesh"] == "data"],
        "devices of one process, fsdp": [row for row in rows if row["processes"] == 1 and row["mesh"] == "fsdp"],
        "processes, data": [row for row in rows if row["devices"] == 1 and row["mesh"] == "data"],
    }
    for label, points in series.items():
        counts = [row["processes"] * row["devices"] for row in points]
        left.plot(counts, [row["of_one_device"] for row in points], marker="o", label=label)
    left.set(xscale="log", xlabel="devices", ylabel="machine's tokens/s, of one device's", ylim=(0, None))
    left.set_xticks(DEVICES, [str(n) for n in DEVICES])
    left.minorticks_off()
    left.axhline(1, color="grey", ls="--", lw=1)
    left.legend(frameon=False, fontsize=8)
    names = [
        (f"{' x '.join(f'{axis} {size}' for axis, size in one['mesh'].items())}: {axis}", one["moved"][axis], size)
        for one in moved
        for axis, size in one["predicted"].items()
    ]
    at = range(len(names))
    right.barh([i - 0.2 for i in at], [size / 1e6 for _, size, _ in names], height=0.4, label="compiled step")
    right.barh([i + 0.2 for i in at], [size / 1e6 for _, _, size in names], height=0.4, label="predicted")
    right.set_yticks(list(at), [name for name, _, _ in names], fontsize=8)
    right.set(xlabel="MB that a device sends in a step")
    right.invert_yaxis()
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--steps", type=positive, default=12, help="of each run")
    parser.add_argument("--rounds", type=positive, default=3, help="of all runs")
    parser.add_argument("--gpus", type=int, default=0, help="use so many GPUs instead of virtual devices")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--traffic", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.traffic:
        print(json.dumps(traffic(json.loads(arguments.traffic))))
        return
    moved = []
    for axes in MESHES.values():
        for count in (2, 4, 8) if len(axes) == 1 else (4,):
            moved.append(in_own_process({axis: count if len(axes) == 1 else 2 for axis in axes}))
            print(f"{moved[-1]['mesh']}: {moved[-1]['moved']} bytes, predicted {moved[-1]['predicted']}", flush=True)
    rows = measure(arguments.steps, arguments.rounds, arguments.gpus)
    results = {"traffic": moved, "runs": rows}
    peers.save("scaling", results, arguments.out)
    plot(rows, moved, PLOT)


if __name__ == "__main__":
    main()
