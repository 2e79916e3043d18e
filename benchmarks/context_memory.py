"""Memory of one device and what devices send, as a long row is split over more of them; read from compiled programs.

The gradient of the loss of one row of 16384 tokens, for a model of attention and one of Mamba-2, on 1 to 8 virtual
devices: nothing is run. `partitioner` is the same program where XLA's partitioner alone splits the rows.

python -m benchmarks.context_memory
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

from benchmarks import peers

LENGTH, DEVICES = 16384, (1, 2, 4, 8)
COLLECTIVE = re.compile(r" = (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\w*\(")
BYTES = {"pred": 1, "bf16": 2, "s32": 4, "f32": 4}


def compiled(mixer: str, devices: int) -> Any:
    """The gradient of the loss of one row over so many devices."""
    import jax
    import jax.numpy as jnp

    from jaxlm import config
    from jaxlm.mesh import Layout
    from jaxlm.models.decoder import Decoder, abstract_params
    from jaxlm.recipes.pretrain import loss_fn

    model = config.Model(
        vocab_size=8192,
        d_model=256,
        n_layers=4,
        n_heads=8,
        n_kv_heads=2,
        d_ff=704,
        max_seq_len=LENGTH,
        pattern=(f"{mixer}+mlp",),
        attention_impl="blockwise",
        layer_loop="scan",
        remat="full",
    )
    layout = Layout.from_config(config.Mesh(data=1, context=devices), jax.devices()[:devices])
    decoder, train = Decoder(model), config.Train(loss_block=1024)
    shapes, _ = abstract_params(decoder)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.replicated), shapes)
    kinds = {**dict.fromkeys(("tokens", "targets", "positions", "segments"), jnp.int32), "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((1, LENGTH), kind, sharding=layout.batch) for name, kind in kinds.items()}
    with layout.active():
        gradient = jax.jit(
            lambda params, batch: jax.grad(loss_fn(decoder, train), has_aux=True)(params, {}, batch, None)
        )
        return gradient.lower(params, batch).compile()


def figures(program: Any) -> dict[str, Any]:
    """Temporary bytes of a device, and the bytes of each kind of collective, those in a loop counted once."""
    sent: dict[str, int] = {}
    for line in program.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            for kind, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", match[1]):
                size = BYTES[kind]
                for dimension in filter(None, shape.split(",")):
                    size *= int(dimension)
                sent[match[2]] = sent.get(match[2], 0) + size
    return {"temporary_bytes": program.memory_analysis().temp_size_in_bytes, "collective_bytes_in_text": sent}


def run(out: Path | None) -> None:
    """Compile all, print a table, write the JSON."""
    from jaxlm.models import attention, mamba, sequence_parallel

    found: dict[str, Any] = {}
    for mixer in ("attention", "mamba2"):
        for devices in DEVICES:
            row = {"jaxlm": figures(compiled(mixer, devices))}
            if devices > 1:
                with contextlib.ExitStack() as patches:
                    for module in (attention, sequence_parallel, mamba):
                        patches.enter_context(mock.patch.object(module, "sequence_axis", lambda: None))
                    row["partitioner"] = figures(compiled(mixer, devices))
            found.setdefault(mixer, {})[devices] = row
            told = ", ".join(f"{name} {one['temporary_bytes'] / 2**20:.0f} MiB" for name, one in row.items())
            print(f"{mixer}, context {devices}: {told}", flush=True)
    peers.save("context_memory", {"tokens": LENGTH, "devices": found}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    run(parser.parse_args().out)
