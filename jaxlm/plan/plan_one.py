"""Plan a run: count it, compile it for the topology, say whether it fits and what it takes.

make(toml.load("dense-69b", ["mesh.fsdp=512", ...]), parse("v5p:8x8x8"), name="dense-69b")
"""

from __future__ import annotations

from jaxlm import config
from jaxlm.counts.flops import flops_per_token
from jaxlm.counts.parameters import matmul_params
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder
from jaxlm.numerics import Policy
from jaxlm.plan.compile_elsewhere import compile_step
from jaxlm.plan.memory import estimate
from jaxlm.plan.report import Plan, price_of
from jaxlm.plan.roofline import times
from jaxlm.plan.topology import Topology
from jaxlm.train.adapters import moved_params


def make(
    cfg: config.Config,
    topology: Topology,
    *,
    name: str = "",
    tokens: float = 0.0,
    price: float | None = None,
    compiling: bool = True,
) -> Plan:
    """Plan `cfg`, whose vocabulary size is known, on `topology`.

    Args:
        tokens: budget of the run; 0: what `train.steps` make.
        price: USD for an hour of one chip; None: the list price, if there is one.
        compiling: ask the compiler; otherwise only our own count is there.

    Raises:
        UserError: the mesh or the batch does not fit the devices, or the compiler fails.
    """
    if not cfg.model.vocab_size:
        raise UserError("model.vocab_size is 0", "name the size of the vocabulary: a plan reads no corpus")
    # Two counts of memory: ours, which is instant and for all chips, and the compiler's, which is exact for the chip
    # whose compiler it is.
    counted = estimate(cfg, topology.devices, topology.slices)
    measured = compile_step(cfg, topology) if compiling else None
    rows = cfg.train.batch_size * cfg.data.seq_len
    # FLOP that the mathematics needs, for MFU: recomputation is work but no progress, so it does not count here.
    decoder = Decoder(cfg.model, Policy.from_config(cfg.numerics))
    moved = moved_params(decoder, cfg.lora) if cfg.lora.rank else ()
    needed = flops_per_token(cfg.model, matmul_params(decoder), cfg.data.seq_len, *moved)
    layout = Layout.abstract(cfg.mesh, topology.devices, topology.slices)
    return Plan(
        config=name,
        topology=str(topology),
        chip=topology.chip.name,
        chips=topology.chips,
        devices=topology.devices,
        hosts=topology.hosts,
        mesh=dict(layout.mesh.shape),
        remat=cfg.model.remat,
        microbatches=cfg.train.microbatches,
        batch_tokens=rows,
        hbm=topology.chip.hbm,
        estimate=counted,
        measured=measured,
        model_flops=needed * rows // topology.devices,
        times=times(measured, topology.chip) if measured and not measured.used_when_refused else None,
        peak_flops=topology.chip.flops,
        price=price_of(topology, price),
        tokens=tokens or float(cfg.train.steps * rows),
    )
