"""Meshes, remat policies and microbatches for a config on a topology, ranked by the time of a step.

All that divide are counted by `memory.estimate` and by a formula for time, in seconds altogether; the best few that
should fit are compiled, and only those are reported.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxlm import config
from jaxlm.config import AXES
from jaxlm.counts.flops import forward_flops
from jaxlm.counts.parameters import matmul_params
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder
from jaxlm.numerics import Policy
from jaxlm.plan.memory import Memory, estimate, stage_trees
from jaxlm.plan.plan_one import make
from jaxlm.plan.report import USABLE, Plan, gib
from jaxlm.plan.topology import Topology
from jaxlm.recipes import make_recipe

MakePlan = Callable[[config.Config, Topology], Plan]
COMPILED = 3
"""Candidates that are compiled."""
MARGIN = 0.9
"""Our count of the memory may be too small by a tenth."""
_RECOMPUTED = {"none": 0.0, "dots": 0.1, "full": 1.0}
"""Forward passes that the backward pass repeats; of `dots` only what is no product, which costs bandwidth."""


class Candidate(NamedTuple):
    """One way to run a config, and what we expect of it."""

    cfg: config.Config
    memory: Memory
    seconds: float

    @property
    def overrides(self) -> str:
        """The options to paste behind `jaxlm train CONFIG`."""
        sizes = [f"mesh.{axis}={getattr(self.cfg.mesh, axis)}" for axis in AXES]
        return " ".join(
            [*sizes, f"model.remat={self.cfg.model.remat}", f"train.microbatches={self.cfg.train.microbatches}"]
        )


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The compiled candidates, best first, and how many were counted."""

    counted: int
    fitting: int
    plans: tuple[tuple[Candidate, Plan], ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [
            {"overrides": one.overrides, "expected_seconds": one.seconds, **plan.as_dict()} for one, plan in self.plans
        ]
        return {"counted": self.counted, "fitting": self.fitting, "ranked": rows}

    def __rich__(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("mesh, remat, microbatches", no_wrap=True)
        for name in ("GiB", "compiled", "seconds", "least", "most", "MFU", "limit"):
            table.add_column(name, justify="right")
        for one, plan in self.plans:
            axes = " ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
            measured_bytes = plan.measured.bytes if plan.measured else 0
            cells = [
                f"{axes}, {plan.remat}, {plan.microbatches}",
                gib(one.memory.bytes),
                gib(measured_bytes),
                f"{one.seconds:.3f}",
            ]
            if plan.times:
                worst = plan.times.worst
                cells += [f"{plan.times.best:.3g}", f"{worst:.3g}", f"{100 * plan.mfu(worst):.1f} %"]
            table.add_row(*cells, *[""] * (7 - len(cells)), plan.limit)
        asked = sum(plan.measured is not None for _, plan in self.plans)
        head = f"{self.counted} ways counted, {self.fitting} should fit, {asked} compiled"
        table.caption = "GiB and seconds counted, compiled; MFU at the most seconds, when nothing overlaps"
        table.caption_justify = "left"
        return Group(Text(head), table)

    @property
    def best(self) -> str:
        """The overrides of the first, to paste."""
        return self.plans[0][0].overrides


def search_plans(cfg: config.Config, topology: Topology, make_plan: MakePlan = make) -> Ranking:
    """Rank the ways to run `cfg` on `topology`, the best few by their plans: `make`, or a part of it.

    Raises:
        UserError: none divides or none fits, with the nearest and its numbers; or the stage cannot be made.
    """
    found = list(_candidates(cfg, topology))
    if not found:
        hint = f"train.batch_size = {cfg.train.batch_size} rows must divide over the devices that split it"
        raise UserError(f"{topology}: no mesh of {topology.devices} devices divides this config", hint)
    # Our count has an error; a candidate that barely fits by it would be compiled in vain.
    room = USABLE * MARGIN * topology.chip.hbm
    fitting = [one for one in found if one.memory.bytes <= room]
    if not fitting:
        least = min(found, key=lambda one: one.memory.bytes)
        need, have = gib(least.memory.bytes), gib(topology.chip.hbm)
        raise UserError(
            f"{topology}: none of {len(found)} ways fits", f"the least needs {need} of {have} GiB: {least.overrides}"
        )
    # One candidate for each kind of mesh (fsdp, tensor, expert), the fastest: otherwise all that are compiled would be
    # neighbours of one another.
    best: dict[Any, Candidate] = {}
    for one in sorted(fitting, key=lambda one: one.seconds):
        best.setdefault(one.cfg.mesh.fsdp * 10**6 + one.cfg.mesh.tensor * 10**3 + one.cfg.mesh.expert, one)
    chosen = list(best.values())[:COMPILED]
    plans = [(one, make_plan(one.cfg, topology)) for one in chosen]
    plans.sort(key=lambda pair: (not pair[1].fits, pair[1].times.worst if pair[1].times else pair[0].seconds))
    return Ranking(len(found), len(fitting), tuple(plans))


def _candidates(cfg: config.Config, topology: Topology) -> Iterator[Candidate]:
    decoder, recipe = Decoder(cfg.model, Policy.from_config(cfg.numerics)), make_recipe(cfg)
    stage_trees(recipe.models, decoder.policy)  # here, for in the loop a UserError means that a mesh does not divide
    # FLOP of a forward pass do not depend on the mesh: counted once for all candidates.
    forward = forward_flops(cfg.model, matmul_params(decoder), cfg.data.seq_len)
    for mesh, remat, parts in itertools.product(_meshes(cfg, topology), _RECOMPUTED, _powers(cfg.train.batch_size)):
        model = dataclasses.replace(cfg.model, remat=remat)
        one = dataclasses.replace(cfg, mesh=mesh, model=model, train=dataclasses.replace(cfg.train, microbatches=parts))
        try:
            memory = estimate(one, topology.devices, topology.slices, recipe)
        except UserError:  # it does not divide
            continue
        yield Candidate(one, memory, _seconds(one, topology, memory, forward))


def _meshes(cfg: config.Config, topology: Topology) -> Iterator[config.Mesh]:
    """Sizes whose product is a slice, replicas across slices; no axis where the model has nothing to split."""
    per_slice = topology.devices // topology.slices
    # An axis is only as long as the model can be split along it: all mixtures must divide, a context part keeps 2048
    # tokens, a head is not cut.
    experts = math.gcd(*(moe.n_experts for moe in cfg.model.moes)) if cfg.model.moes else 1
    limits = {"expert": experts, "context": max(1, cfg.data.seq_len // 2048), "tensor": min(16, cfg.model.n_heads)}
    for expert, context, tensor in itertools.product(*(_divisors(per_slice, limits[axis]) for axis in limits)):
        if per_slice % (expert * context * tensor):
            continue
        rest = per_slice // (expert * context * tensor)
        for fsdp in _divisors(rest, rest):
            sizes = {"data": rest // fsdp, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
            dcn = dataclasses.replace(cfg.mesh.dcn, data=topology.slices)
            yield dataclasses.replace(cfg.mesh, **sizes, dcn=dcn)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _powers(number: int) -> list[int]:
    return [2**i for i in range(8) if number % 2**i == 0]


def _seconds(cfg: config.Config, topology: Topology, memory: Memory, forward: int) -> float:
    """Expected time of a step, nothing overlapping: products at the peak, and what each axis must carry."""
    mesh, model, chip, again = cfg.mesh, cfg.model, topology.chip, _RECOMPUTED[cfg.model.remat]
    width, parts = Policy.from_config(cfg.numerics).compute.itemsize, cfg.train.microbatches
    # Devices along `tensor` share their tokens, hence the factor.
    tokens = cfg.train.batch_size * cfg.data.seq_len // topology.devices * mesh.tensor
    held = memory.parameters * width / Policy.from_config(cfg.numerics).params.itemsize
    stream, layers = tokens * model.d_model * width, model.n_layers
    top_k = max((moe.top_k for moe in model.moes), default=0)
    halves = [model.halves(kind) for kind in model.pattern]
    branches = sum(1 + bool(half.ffn_name) for half in halves) / len(halves)
    keys = 2 * model.n_kv_heads * model.head_dim * tokens * width / mesh.tensor
    # What an axis carries in a step. data: the sum of gradients, which costs twice the size. fsdp: parameters gathered
    # forward and backward and gradients scattered, once more when the forward pass is repeated. expert: tokens there
    # and back, both passes. context: keys and values around the ring. tensor: one sum for each branch of a layer, both
    # passes.
    sent = {
        "data": 2 * memory.parameters * parts,
        "fsdp": held * mesh.fsdp * (3 + (again > 0)) * parts,
        "expert": stream / mesh.tensor * top_k * layers * (4 + 2 * again),
        "context": keys * mesh.context * layers * (3 + again),
        "tensor": 2 * stream * branches * layers * (2 + again),
    }
    moved = (_time(float(sent[axis]), axis, mesh, topology) for axis in AXES)
    flops = (3 + again) * forward * tokens / mesh.tensor
    # Memory traffic: the optimiser reads the gradients and reads and writes parameters and moments; each microbatch
    # reads the gathered parameters three times and moves its activations four times.
    traffic = (
        7 * memory.parameters + 3 * parts * held * mesh.fsdp + 4 * parts * memory.activations
    ) / chip.hbm_bandwidth
    return max(flops / chip.flops, traffic) + sum(moved)


def _time(size: float, axis: str, mesh: config.Mesh, topology: Topology) -> float:
    """Seconds to send `size (n - 1) / n` bytes along an axis; the last axes have the nearest neighbours."""
    n = mesh.sizes[axis] * (topology.slices if axis == "data" else 1)
    if n == 1:
        return 0.0
    # The last axes of the mesh vary fastest, so their members are neighbours. On TPUs a ring of four or more sends both
    # ways; on GPUs an axis that reaches beyond a host goes over its network cards.
    chip, inner = topology.chip, math.prod(mesh.sizes[one] for one in AXES[AXES.index(axis) + 1 :])
    speed = chip.link
    if chip.platform == "tpu":
        speed *= 2 if n >= 4 else 1
        if axis == "data" and topology.slices > 1:
            speed = chip.network * topology.devices / topology.slices / inner
    elif inner * n > chip.host:
        speed = chip.network * max(1, chip.host // inner)
    return size * (n - 1) / n / speed
