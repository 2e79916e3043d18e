"""The training step of a config, compiled for a topology in a process of its own, and what the compiler says about it.

`python -m jaxlm.plan.compile_elsewhere < request.json` writes the measurements as JSON: the environment that libtpu and
virtual devices need must stand before JAX is imported, and what a compiler logs or leaves behind stays there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.plan.hlo.program import Program
from jaxlm.plan.hlo.program import parse as parse_hlo
from jaxlm.plan.topology import Topology, environment, parse, target


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one kind of collective moves along some axes of the mesh. Bytes of one device in one step."""

    kind: str
    axes: tuple[str, ...]
    bytes: int
    runs: int
    bandwidth: float
    """Bytes a second that a device can send along these axes."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled step. Bytes and FLOP are those of one device."""

    compiler: str
    note: str
    seconds: float
    """How long tracing and compiling took."""
    argument_bytes: int
    """The state and the batch, as the step finds them."""
    output_bytes: int
    """What it returns in new memory: the donated state is overwritten in place."""
    temporary_bytes: int
    """All else that must be there at one time: gradients, activations, gathered parameters, buffers."""
    flops: int
    """Matrix products of a step, with those that are recomputed; experts have equally many tokens."""
    recomputed_flops: int
    memory_traffic: int
    """Bytes between chip and memory."""
    busy_seconds: float
    """How long a chip computes if its operations follow one another, each at its own roofline."""
    traffic: tuple[Traffic, ...]
    unknown_loops: int
    """Loops whose trip count depends on data; each is counted as one turn."""
    used_when_refused: int = 0
    """Bytes that the compiler asked for when it refused the step for want of memory; then all else is 0."""

    @property
    def bytes(self) -> int:
        """Memory of one device."""
        return self.used_when_refused or self.argument_bytes + self.output_bytes + self.temporary_bytes


def compile_step(cfg: config.Config, topology: Topology) -> Measured:
    """Compile the step of `cfg` for `topology` in a process of its own.

    Raises:
        UserError: the config does not fit the mesh, or the compiler fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Another process, because platform and number of devices are fixed when JAX is imported; and because a compiler
        # that aborts must not take this one with it. The answer is a file, since compilers print on both streams.
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        request = {"config": toml.to_dict(cfg), "topology": str(topology), "answer": str(answer)}
        with log.open("wb") as errors:
            command = [sys.executable, "-m", "jaxlm.plan.compile_elsewhere"]
            done = subprocess.run(
                command, input=json.dumps(request).encode(), stdout=errors, stderr=errors, check=False
            )
        if not answer.exists():
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise UserError(f"{topology}: the compiler ended with {done.returncode}: {''.join(last)[:300]}")
        content = json.loads(answer.read_text())
    if "error" in content:
        raise UserError(content["error"], content["hint"])
    content["traffic"] = tuple(Traffic(**{**one, "axes": tuple(one["axes"])}) for one in content["traffic"])
    return Measured(**content)


def measure(cfg: config.Config, topology: Topology) -> Measured:
    """`compile_step` within this process, whose environment is prepared."""
    import jax

    from jaxlm.mesh import Layout
    from jaxlm.ops.moe.exchange import FURTHER_ROUNDS
    from jaxlm.recipes import make_recipe
    from jaxlm.train.program import abstract_inputs, training_program

    start, goal = time.perf_counter(), target(topology)
    layout = Layout.from_config(cfg.mesh, goal.devices)
    # Without the switch JAX would compile a float64 config in float32, and memory would be counted as half.
    wide = "float64" in (cfg.numerics.params, cfg.numerics.compute)
    with jax.enable_x64(wide):
        program = training_program(cfg, layout, make_recipe(cfg))
        lowered = program.step.lower(*abstract_inputs(cfg, layout, program))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            # "Does not fit" is an answer: the message has the bytes that would be needed. Any other failure is an
            # error.
            used = _asked_for(str(error))
            if not used:
                raise UserError(f"{topology}: the compiler fails: {str(error).splitlines()[0][:300]}") from None
            return Measured(goal.compiler, goal.note, time.perf_counter() - start, 0, 0, 0, 0, 0, 0, 0.0, (), 0, used)
    program = parse_hlo(compiled.as_text(), idle=FURTHER_ROUNDS, grouped_rows=_rows_of_experts(cfg, layout))
    return _read(compiled, program, layout, topology, goal.compiler, goal.note, start)


def _rows_of_experts(cfg: config.Config, layout: Any) -> int:
    """Rows that the experts of a device compute at a time while all have equally many; 0: there are no experts.

    What lies in the other places that an exchange has room for is not computed: see `ops.grouped`.
    """
    axes = {*layout.along("batch"), *layout.along("seq"), *layout.along("experts")}
    tokens = cfg.train.batch_size * cfg.data.seq_len // cfg.train.microbatches
    rows = tokens * max((moe.top_k for moe in cfg.model.moes), default=0)
    return -(-rows // math.prod(layout.mesh.shape[axis] for axis in axes))


def _read(
    compiled: Any, program: Program, layout: Any, topology: Topology, compiler: str, note: str, start: float
) -> Measured:
    from jaxlm.plan.hlo.collectives import collectives
    from jaxlm.plan.links import bandwidth

    # Outputs that alias arguments are the donated state, overwritten in place: counted once, with the arguments.
    memory = compiled.memory_analysis()
    flops, devices = program.flops(), list(layout.mesh.devices.flat)
    sums: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for one in collectives(program, layout.mesh.shape):
        if one.axes:
            # Groups of one collective are alike; collectives of one kind and axes are added, at the slowest of their
            # speeds.
            speed = bandwidth(one.groups[0].tolist(), devices, topology, one_way=one.kind == "collective-permute")
            old = sums.get((one.kind, one.axes), Traffic(one.kind, one.axes, 0, 0, speed))
            moved, runs = old.bytes + one.times * one.moved, old.runs + one.times
            sums[one.kind, one.axes] = Traffic(one.kind, one.axes, moved, runs, min(old.bandwidth, speed))
    return Measured(
        compiler=compiler,
        note=note,
        seconds=time.perf_counter() - start,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=flops.total,
        recomputed_flops=flops.recomputed,
        memory_traffic=program.traffic(),
        busy_seconds=program.busy(topology.chip.flops, topology.chip.hbm_bandwidth),
        traffic=tuple(sorted(sums.values(), key=lambda one: -one.bytes / one.bandwidth)),
        unknown_loops=len(program.unknown_loops),
    )


_REFUSALS = (r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds")
"""What the TPU compiler says when memory is short."""


def _asked_for(message: str) -> int:
    """Bytes that a refused step would need, 0 if the message is another."""
    found = next((one for pattern in _REFUSALS if (one := re.search(pattern, message))), None)
    return int(float(found.group(1)) * 1024 ** " KMGT".index(found.group(2) or " ")) if found else 0


def main() -> None:
    """Serve one request on the standard input."""
    request = json.load(sys.stdin)
    topology = parse(request["topology"])
    with environment(topology), contextlib.suppress(KeyboardInterrupt):
        try:
            content: dict[str, Any] = dataclasses.asdict(measure(toml.from_dict(request["config"]), topology))
        except UserError as error:
            content = {"error": error.message, "hint": error.hint}
        Path(request["answer"]).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
