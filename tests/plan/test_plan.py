"""Plans: our count of memory and FLOP against compilers, what is refused, what is said."""

import dataclasses
import functools
import importlib.util
import io
import json
import math
import subprocess
import sys

import jax
import pytest
from rich.console import Console

from jaxlm import cli, config
from jaxlm.config import registry, toml
from jaxlm.counts.activation_memory import Moving, activations
from jaxlm.counts.flops import mixing_flops
from jaxlm.counts.parameters import matmul_params
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.models.decoder import Decoder
from jaxlm.plan import memory, search
from jaxlm.plan.compile_elsewhere import Traffic, _asked_for, compile_step, measure
from jaxlm.plan.memory import estimate
from jaxlm.plan.plan_one import make
from jaxlm.plan.roofline import times
from jaxlm.plan.search import search_plans
from jaxlm.plan.topology import parse
from jaxlm.recipes import make_recipe
from jaxlm.train.program import abstract_inputs, training_program

eight = pytest.mark.skipif(jax.device_count() != 8, reason="needs the 8 virtual devices of conftest.py")
tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the extra plan-tpu")
CPU = parse("cpu:8")
count_only = functools.partial(make, compiling=False)
MODEL = {"vocab_size": 512, "d_model": 64, "n_layers": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 192}
KINDS = {
    "dense": {"pattern": ("attention+mlp",)},
    "moe": {"pattern": ("attention+moe",), "moe": config.MoE(n_experts=4, d_ff=96, impl="naive")},
    "mamba": {"pattern": ("mamba",)},
    "hybrid": {"pattern": ("mamba", "attention+mlp")},
}


def tiny(kind: str = "dense", **model) -> config.Config:
    """Small runs whose state weighs about as much as their activations."""
    return config.Config(
        model=config.Model(**MODEL, **KINDS[kind], **model),
        data=config.Data(seq_len=32),
        train=config.Train(batch_size=8),
    )


@pytest.fixture(scope="module")
def measured():
    """What the CPU's compiler says of each kind."""
    return {kind: measure(tiny(kind), CPU) for kind in KINDS}


@eight
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_the_compiler(kind, measured):
    """The state within a hundredth, in place; all else is of the right size. The tenth is promised of TPUs, below."""
    counted, told = estimate(tiny(kind), 8), measured[kind]
    assert abs(counted.state - told.argument_bytes) < 0.01 * told.argument_bytes
    assert told.output_bytes < 1000  # the donated state comes back in place
    assert 0.5 < counted.bytes / told.bytes < 1.1


STAGES = {
    "adapters": {"recipe": "sft", "lora": {"rank": 4}},
    "whole modules": {"recipe": "sft", "lora": {"rank": 4, "modules_to_save": ["embed"]}},
    "four bits": {"recipe": "sft", "lora": {"rank": 4, "quantize": "nf4"}},
    "reference": {"recipe": "dpo"},
    "value model": {"recipe": "ppo", "rl": {"rewards": ["exact_text"], "kl": "loss", "iterations": 2}},
    "a stage of these tests": {"recipe": "tests.toy_stage:recipe"},
}


@eight
@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["data", "fsdp"])
def test_state_of_the_stages(kind, mesh):
    """Trained and frozen trees and the batch are what the step takes, byte for byte."""
    if "these tests" in kind and "tensor" in mesh:
        mesh = {"data": 2, "fsdp": 4}  # its models have one head, which no tensor axis splits
    common = {"model": {**MODEL, "n_heads": 4}, "data": {"seq_len": 32}, "mesh": mesh}
    cfg = toml.from_dict({**common, "train": {"batch_size": 8, "init_from": "base"}, **STAGES[kind]})
    layout = Layout.from_config(cfg.mesh, jax.devices())
    taken = jax.tree.leaves(abstract_inputs(cfg, layout, training_program(cfg, layout, make_recipe(cfg))))
    wanted = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in taken)
    assert estimate(cfg, 8).state == pytest.approx(wanted, abs=200), "but for a few counters"


@eight
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_flops_are_the_analytic_ones(kind, measured):
    """Within 2 %: every product of forward and backward; short rows multiply the masked half of the scores too."""
    cfg = tiny(kind)
    if kind == "moe":  # `naive` computes all of its experts
        every = dataclasses.replace(cfg.model.moe, top_k=4)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=every))
    a_token = 6 * matmul_params(Decoder(cfg.model)) + 6 * mixing_flops(cfg.model, 32)
    assert 0.98 < measured[kind].flops / (a_token * 8 * 32 / 8) < 1.02
    assert measured[kind].recomputed_flops == 0


@eight
def test_recomputation_is_stated_apart(measured):
    again = measure(tiny(remat="full"), CPU)
    assert again.recomputed_flops > 0.15 * again.flops
    assert abs(again.flops - again.recomputed_flops - measured["dense"].flops) < 0.03 * measured["dense"].flops


@eight
def test_the_engine_runs_what_is_planned(tmp_path):
    from jaxlm.train.engine import JaxEngine

    cfg = dataclasses.replace(tiny(), out_dir=str(tmp_path), data=config.Data(seq_len=32, cache_dir=str(tmp_path)))
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_layers=2))
    engine, layout = JaxEngine(cfg, make_recipe(cfg), lambda *_: []), Layout.from_config(cfg.mesh)
    program = training_program(cfg, layout, make_recipe(cfg))
    state, frozen, batch = abstract_inputs(cfg, layout, program)
    ours = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), engine.state)
    planned = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), state)
    assert ours == planned
    assert engine._step.lower(engine.state, {}, batch).as_text() == program.step.lower(state, frozen, batch).as_text()


RECORDED = [  # what `jaxlm plan` printed as the memory that the TPU compiler (libtpu 0.0.42.1) asks for, in GiB
    ("v5p:8x8x8", "dense-69b", "mesh.data=1 mesh.fsdp=512 train.batch_size=512", 16.08),
    ("v5p:8x8x8", "dense-69b", "mesh=fsdp-tensor8 train.batch_size=512", 49.01),
    ("v6e:8x8", "dense-6.74b", "mesh.data=1 mesh.fsdp=64 train.batch_size=64", 5.94),
    ("v6e:8x8", "moe-812m-a472m", "mesh.data=1 mesh.fsdp=8 mesh.expert=8 train.batch_size=256", 3.48),
    ("v6e:2x2", "dense-113m", "mesh.data=1 mesh.fsdp=4 model.dropout=0.0", 1.28),
    ("v6e:2x2", "mamba-115m", "mesh.data=1 mesh.fsdp=4 model.dropout=0.0", 1.85),
]


@pytest.mark.parametrize(("topology", "name", "overrides", "size"), RECORDED)
def test_memory_is_near_the_tpu_compilers(topology, name, overrides, size):
    options = ["numerics.compute=bfloat16", "model.remat=full", *overrides.split()]
    counted = estimate(toml.load(name, options), parse(topology).devices)
    assert 0.9 < counted.bytes / 2**30 / size < 1.1


@tpu
@pytest.mark.soak
@pytest.mark.parametrize(("topology", "name", "overrides", "size"), RECORDED)
def test_the_tpu_compiler_says_what_is_recorded(topology, name, overrides, size):
    options = ["numerics.compute=bfloat16", "model.remat=full", *overrides.split()]
    plan = make(toml.load(name, options), parse(topology), name=name)
    assert plan.bytes / 2**30 == pytest.approx(size, rel=0.01)
    assert plan.measured is not None
    assert 0.979 < (plan.measured.flops - plan.measured.recomputed_flops) / plan.model_flops < 1.02


FITS = {  # the machine that a named config is planned for, and how: counted here, compiled by `make soak`
    (0, 3e7): ("v5e:1x1", "train.batch_size=8"),
    (3e7, 7e8): ("v5e:2x2", "mesh.data=1 mesh.fsdp=4 train.batch_size=16"),
    (7e8, 3e9): ("v6e:4x4", "mesh.data=1 mesh.fsdp=16 train.batch_size=32"),
    (3e9, 2e10): ("v6e:8x8", "mesh.data=1 mesh.fsdp=64 train.batch_size=64"),
    (2e10, 1e12): ("v5p:8x8x8", "mesh.data=1 mesh.fsdp=512 train.batch_size=512"),
}


def machine_of(path) -> tuple[str, list[str]]:
    from jaxlm.counts.parameters import parameters

    total = parameters(toml.load(path).model)[0]
    topology, overrides = next(row for (low, high), row in FITS.items() if low <= total < high)
    return topology, [*overrides.split(), "model.remat=full", "numerics.compute=bfloat16"]


@pytest.mark.parametrize("path", registry.entries(), ids=lambda path: path.stem)
def test_every_named_config_fits_a_machine(path):
    topology, overrides = machine_of(path)
    plan = make(toml.load(path, overrides), parse(topology), name=path.stem, compiling=False)
    assert plan.fits, plan.verdict


@tpu
@pytest.mark.soak
@pytest.mark.parametrize("path", registry.entries(), ids=lambda path: path.stem)
def test_every_named_config_compiles_for_its_machine(path, monkeypatch):
    """The least effort takes a quarter of the time and more memory; where that does not fit, the full one decides."""
    topology, overrides = machine_of(path)
    cfg = toml.load(path, [*overrides, "model.dropout=0.0"])
    for effort in ("-1", "0"):
        monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", effort)
        plan = make(cfg, parse(topology), name=path.stem)
        assert plan.of_chip, plan.verdict
        if plan.fits:
            return
    pytest.fail(plan.verdict)


EXPERTS = "model.pattern=['attention+moe'] model.moe.n_experts=8 model.moe.d_ff=512 model.n_layers=2"


@tpu
@pytest.mark.parametrize(
    ("axis", "overrides"),  # of experts: memory is recorded above, FLOP are counted by the compiler of CPUs
    [("fsdp", "train.batch_size=64"), pytest.param("expert", EXPERTS, marks=pytest.mark.soak)],
)
def test_the_compiler_of_the_chip_is_asked(axis, overrides):
    """For four v6e chips: our count of memory within a tenth, of FLOP within 2 %, collectives along the axis alone."""
    options = ["mesh.data=1", f"mesh.{axis}=4", "model.remat=full", "numerics.compute=bfloat16", *overrides.split()]
    plan = make(toml.load("dense-15.5m", options), parse("v6e:2x2"), tokens=1e9)
    assert plan.of_chip and plan.measured is not None and plan.measured.compiler == "tpu" and plan.fits
    assert 0.9 < plan.estimate.bytes / plan.measured.bytes < 1.1
    assert 0.98 < (plan.measured.flops - plan.measured.recomputed_flops) / plan.model_flops < 1.02
    assert plan.measured.unknown_loops == 0
    assert plan.measured.traffic and {one.axes for one in plan.measured.traffic} == {(axis,)}
    assert plan.times is not None and plan.times.best < plan.times.worst and plan.cost(1.0) is not None


def test_the_command_plans_a_stage_that_it_does_not_know(tmp_path, capsys, monkeypatch):
    """Two trained trees, a filter, a frozen teacher, labels: our count of what lies there is the compiler's, and all of
    it within a tenth."""
    model = {**MODEL, "n_layers": 2, "n_kv_heads": 4}
    stage = {"recipe": "tests.toy_stage:recipe", "model": model, "data": {"seq_len": 32}, "train": {"batch_size": 8}}
    (tmp_path / "toy.toml").write_text(toml.to_toml(toml.from_dict(stage)))
    command = ["jaxlm", "plan", str(tmp_path / "toy.toml"), "--topology", "cpu:8", "--json", "mesh.fsdp=2"]
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 0
    plan = json.loads(capsys.readouterr().out)
    counted = sum(plan["estimate"][part] for part in ("parameters", "optimizer", "batch"))
    measured = plan["measured"]
    assert plan["fits"] and counted == pytest.approx(measured["argument_bytes"], rel=0.01)
    everything = measured["argument_bytes"] + measured["temporary_bytes"]
    assert sum(plan["estimate"].values()) == pytest.approx(everything, rel=0.1)


def test_what_does_not_move_keeps_less():
    """Blocks that only pass a gradient on keep no inputs of products; those that nothing moves before keep nothing."""
    layout = Layout.abstract(config.Mesh(), 1)
    moving = Moving(), Moving(blocks=False), Moving(blocks=False, before=False)
    everything, passing, nothing = (activations(tiny(), layout, 1, one).kept for one in moving)
    assert 0.6 < passing / everything < 0.8 and nothing == 0


@eight
def test_a_plan_says_what_it_found():
    """On one chip type: 80 GB hold it; the memory of a smaller chip does not, with the numbers."""
    told = dataclasses.replace(
        measure(dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, n_layers=2)), CPU),
        traffic=(Traffic("all-reduce", ("data",), 10**12, 3, 50e9),),
    )
    plan = make(tiny(), parse("h100:8"), name="tiny", compiling=False, price=2.0, tokens=1e9)
    plan = dataclasses.replace(plan, measured=told, times=times(told, parse("h100:8").chip))
    assert plan.limit == "links along data" and plan.times is not None and plan.times.best == pytest.approx(20)
    assert plan.hours(36.0) == pytest.approx(1e9 / 256 * 36 / 3600)
    assert plan.cost(36.0) == pytest.approx(plan.hours(36.0) * 8 * 2)
    page = io.StringIO()
    Console(width=120, file=page).print(plan)
    text = page.getvalue()
    assert "What binds is links along data." in text and "all-reduce" in text and "USD at 2.00" in text
    full = dataclasses.replace(plan, hbm=plan.bytes)
    assert not full.fits and full.limit == "memory" and "does not fit" in full.verdict
    assert json.loads(json.dumps(full.as_dict()))["fits"] is False


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"mesh": config.Mesh(data=3)}, "does not fit 8 devices"),
        ({"train": config.Train(batch_size=12)}, "batch of 12 does not divide"),
        ({"mesh": config.Mesh(tensor=8)}, "does not divide over tensor = 8"),
        ({"model": config.Model()}, "model.vocab_size is 0"),
    ],
)
def test_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        make(dataclasses.replace(tiny(), **overrides), CPU, compiling=False)
    assert words in str(caught.value)


def test_search_ranks_what_divides_and_fits(monkeypatch):
    made = []
    for module in (search, memory):
        monkeypatch.setattr(module, "make_recipe", lambda cfg: made.append(cfg) or make_recipe(cfg))
    ranking = search_plans(tiny("moe"), CPU, count_only)
    assert len(made) == 1 + len(ranking.plans)  # a teacher is opened once, and not for each that is counted
    assert ranking.counted > 50 and len(ranking.plans) == 3
    for one, plan in ranking.plans:
        assert plan.fits and plan.devices == 8 and len(one.overrides.split()) == 7
        assert 4 % one.cfg.mesh.expert == 0
    assert ranking.best == ranking.plans[0][0].overrides
    assert [one.seconds for one, _ in ranking.plans] == sorted(one.seconds for one, _ in ranking.plans)


def test_choices_of_a_search_are_counted_by_themselves():
    cfg = tiny("dense")
    recipe = make_recipe(cfg)
    kept = {}
    for remat in ("none", "full"):
        one = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))
        kept[remat] = estimate(one, 8, recipe=recipe).activations
    assert kept["none"] > 1.5 * kept["full"]


def test_search_says_what_is_missing():
    with pytest.raises(UserError, match=r"none of \d+ ways fits \(the least needs .* of 16.00 GiB: mesh.data="):
        search_plans(toml.load("dense-69b", ["train.batch_size=8"]), parse("v5e:2x2"), count_only)
    with pytest.raises(UserError, match="no mesh of 7 devices divides"):
        search_plans(tiny(), parse("h100:7"), count_only)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"recipe": "distill"}, "the recipe distill has no teacher"),
        ({"recipe": "sft", "lora": config.LoRA(rank=4, targets=("nowhere",))}, "nowhere"),
    ],
)
def test_search_names_a_mistake_of_the_stage(stage, words):
    """It is the same on every mesh, so it must not read as if no mesh divided."""
    train = config.Train(batch_size=8, init_from="base")
    with pytest.raises(UserError, match=words):
        search_plans(dataclasses.replace(tiny(), train=train, **stage), CPU, count_only)


def test_the_command(tmp_path):
    """In a process of its own, with another for the compiler."""
    small = dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, n_layers=2))
    path = tmp_path / "small.toml"
    path.write_text(toml.to_toml(small))
    command = [sys.executable, "-m", "jaxlm", "plan", str(path), "--topology", "cpu:8", "--json", "mesh.fsdp=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fits"] and told["mesh"]["fsdp"] == 2 and told["measured"]["compiler"] == "cpu"
    refused = subprocess.run([*command[:-1], "mesh.fsdp=3"], capture_output=True, text=True, timeout=250)
    assert refused.returncode == 2 and refused.stderr.startswith("error: [mesh]"), refused.stderr


@pytest.mark.parametrize(
    ("message", "size"),
    [
        ("Ran out of memory in memory space hbm. Used 120.5G of 95.74G hbm. Exceeded hbm capacity by 24.8G.", 120.5),
        ("the total memory required for HLO temporaries (1.02T) exceeds available HBM (95.74G).", 1.02 * 1024),
        ("INTERNAL: Mosaic failed to compile", 0),
    ],
)
def test_what_a_refused_step_would_need_is_read(message, size):
    assert _asked_for(message) == int(size * 2**30)


def test_a_failing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="the compiler ended with 1"):
        compile_step(tiny(), CPU)
