"""The training step of a 6.7B model for 8 H100s, compiled on this machine, which has none: memory and kernels.

make plan-gpu

Rows of 4096 tokens, two a device; the state is split over all 8. CUDA's compiler in XLA needs neither driver nor device
(`jaxlm/plan/cuda.py`). Nothing is run: these are no timings of the step, but what the compiler has allotted.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import re
import time
from pathlib import Path
from typing import Any

from benchmarks import peers
from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.plan import topology

CHIPS, CONFIG = "h100:8", "dense-6.74b"
OPTIONS = ["numerics.compute=bfloat16", "model.remat=full", "train.batch_size=16", "train.loss_block=4096"]
MESH = ["mesh.data=1", "mesh.fsdp=8"]
PACKAGES = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12")


def compiled(cfg: config.Config, devices: Any) -> dict[str, Any]:
    """What the compiler says of the step; bytes are of one device."""
    from jaxlm.mesh import Layout
    from jaxlm.recipes import make_recipe
    from jaxlm.train.program import abstract_inputs, training_program

    layout = Layout.from_config(cfg.mesh, devices)
    program = training_program(cfg, layout, make_recipe(cfg))
    start = time.perf_counter()
    step = program.step.lower(*abstract_inputs(cfg, layout, program)).compile()
    seconds, memory, text = time.perf_counter() - start, step.memory_analysis(), step.as_text()
    names = re.findall(r'custom_call_target="([^"]+)"', text)
    moved = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    return {
        "compile_s": seconds,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "custom_calls": dict(collections.Counter(names)),
        "collectives": dict(collections.Counter(moved)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file to write; default: benchmarks/results/plan_gpu.json")
    arguments = parser.parse_args()
    machine = topology.parse(CHIPS)
    with topology.environment(machine):
        target = topology.target(machine)
    if target.compiler != "gpu":
        parser.exit(2, f"{target.note}\n")
    results = {}
    for attention in ("cudnn", "blockwise", "xla"):
        cfg = toml.load(registry.find(CONFIG), [*OPTIONS, *MESH, f"model.attention_impl={attention}"])
        results[attention] = found = compiled(cfg, target.devices)
        state, temporary = found["state_bytes"] / 1e9, found["temporary_bytes"] / 1e9
        print(
            f"{attention}: {found['compile_s']:.1f} s, state {state:.2f} GB, temporaries {temporary:.2f} GB", flush=True
        )
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = {"topology": CHIPS, "config": CONFIG, "overrides": [*OPTIONS, *MESH], "packages": versions}
    peers.save("plan_gpu", record | {"attention": results}, arguments.out)


if __name__ == "__main__":
    main()
