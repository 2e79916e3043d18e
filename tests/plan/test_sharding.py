"""What `describe` says of a layout is what lies on the devices."""

import dataclasses
import io
import json

import jax
import pytest
from rich.console import Console

from jaxlm import config
from jaxlm.config import registry, toml
from jaxlm.counts.parameters import account
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.plan.sharding import describe
from jaxlm.train.optim import make_optimizer
from jaxlm.train.program import state_shardings
from jaxlm.train.step import init_state

MODEL = config.Model(vocab_size=32, d_model=16, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=32, layer_loop="scan")


def run(preset: str, **sizes: int) -> config.Config:
    mesh = toml.from_dict({"mesh": registry.mesh(preset) | sizes}).mesh
    return config.Config(model=MODEL, mesh=mesh, data=config.Data(seq_len=8))


@pytest.mark.parametrize(
    "cfg", [run("fsdp-tensor8", tensor=2), run("zero1"), run("replicas")], ids=["fsdp-tensor2", "zero1", "replicas"]
)
def test_it_says_what_the_devices_hold(cfg):
    told = describe(cfg, devices=8)
    decoder, optimizer = Decoder(cfg.model), make_optimizer(cfg.train)
    shardings = state_shardings(decoder, optimizer, Layout.from_config(cfg.mesh))
    start = jax.jit(lambda key: init_state(init_params(decoder, key), optimizer), out_shardings=shardings)
    state = start(jax.random.key(0))
    for kind, tree in (("parameter", state.params), ("optimizer", state.opt_state)):
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        leaves = [leaf for leaf in told.leaves if leaf.kind == kind]
        for leaf, (path, array) in zip(leaves, flat, strict=True):
            parts = {str(shard.index): shard.data for shard in array.addressable_shards}
            (shape,) = {part.shape for part in parts.values()}
            assert leaf.name == jax.tree_util.keystr(path, simple=True, separator=".")
            assert (leaf.shape, leaf.local_shape) == (array.shape, shape), leaf.name
            assert leaf.copies == 8 // len(parts), leaf.name
            assert leaf.local_bytes == next(iter(parts.values())).nbytes
    counted = account(dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **told.mesh)))
    assert told.bytes("parameter") == counted.parameter_bytes
    assert told.bytes("optimizer") == counted.optimizer_bytes + 8  # two counters of updates


def test_layers_that_are_not_stacked_have_no_axis_of_layers():
    cfg = run("replicas")
    cfg = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, fsdp=4, rules={"layers": ("fsdp",), "embed": ()}))
    scanned = describe(cfg, devices=8)
    unrolled = describe(dataclasses.replace(cfg, model=dataclasses.replace(MODEL, layer_loop="unroll")), devices=8)
    assert {leaf.split for leaf in scanned.leaves if leaf.of.startswith("layers")} == {"layers/fsdp"}
    assert {leaf.split for leaf in unrolled.leaves} == {"whole"}


def test_float64_is_twice_as_large():
    cfg = run("zero1")
    wide = dataclasses.replace(cfg, numerics=config.Numerics(params="float64", compute="float64"))
    assert describe(wide, devices=8).bytes("parameter") == 2 * describe(cfg, devices=8).bytes("parameter")


def test_it_is_shown_and_written():
    told = describe(run("zero1"), devices=8)
    text = io.StringIO()
    Console(file=text, width=160).print(told)
    lines = [" ".join(line.split()) for line in text.getvalue().splitlines()]
    assert lines[0] == "8 devices: data 8"
    assert "embed.embedding 32x16 whole 32x16 0.0 8" in lines
    assert "optimiser of embed.embedding 32x16 embed/data 32x2 0.0 1" in lines
    written = json.loads(json.dumps(told.as_dict()))
    assert (written["devices"], written["parameter_bytes"]) == (8, told.bytes("parameter"))
    assert {leaf["kind"] for leaf in written["leaves"]} == {"parameter", "optimizer"}


def test_a_pod_of_slices_needs_no_devices():
    cfg = toml.load("dense-69b", ["mesh=multislice", "mesh.tensor=8"])
    told = describe(cfg, devices=512, slices=4)
    assert told.mesh == {"data": 4, "fsdp": 16, "expert": 1, "context": 1, "tensor": 8}
    assert told.dcn == {"data": 4, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
    (kernel,) = (leaf for leaf in told.leaves if leaf.name == "layers.slot_0.mixer.q_proj.kernel")
    assert kernel.local_shape == (80, 8192 // 16, 64 // 8, 128) and kernel.copies == 4
    with pytest.raises(UserError, match="kv_heads of 8 does not divide over tensor = 16 devices"):
        describe(toml.load("dense-69b", ["mesh=fsdp-tensor8", "mesh.tensor=16"]), devices=512)
