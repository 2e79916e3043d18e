"""Training in PyTorch: runs that resume bitwise, checkpoints that survive damage, options that do what they say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jaxlm import config
from jaxlm.config import toml as config_file
from jaxlm.convert.open_model import load
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.recipes import make_recipe, start
from jaxlm.report.run_page import write_report
from jaxlm.run.metrics import OF_THE_MACHINE
from jaxlm.train import loop
from parity_tests.tolerances import FLOAT64
from torch_ref.models.decoder import Decoder, init_params
from torch_ref.recipes.pretrain import loss_fn
from torch_ref.train.checkpoint import Checkpointer
from torch_ref.train.engine import TorchEngine, pick_device
from torch_ref.train.optim import make_optimizer
from torch_ref.train.step import Part, TrainState, make_step

TOML = """
[model]
d_model = 16
n_layers = 2
n_heads = 2
n_kv_heads = 1
d_ff = 32
dropout = 0.1
[tokenizer]
kind = "bytes"
[data]
source = "{source}"
cache_dir = "{cache}"
seq_len = 16
validation_fraction = 0.2
[train]
steps = 12
batch_size = 4
microbatches = 2
warmup_steps = 4
[eval]
every = 5
batches = 2
[sample]
prompts = ["def "]
max_new_tokens = 5
[checkpoint]
every = 3
keep = 2
[log]
every = 1
"""


@pytest.fixture(scope="module")
def toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the source of torch_ref."""
    folder = tmp_path_factory.mktemp("torch")
    source = Path(__file__).parents[1] / "torch_ref"
    (folder / "tiny.toml").write_text(TOML.format(source=source, cache=folder / "cache"))
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def train(toml: Path) -> Callable[..., None]:
    """A function that trains the tiny model in a folder."""

    def run(out: Path, *overrides: str, resume: bool = False) -> None:
        cfg = config_file.load(toml, [f'out_dir="{out}"', *overrides])
        start.run(cfg, resume=resume, backend="torch")

    return run


@pytest.fixture(scope="module")
def whole(train: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs; it draws its page."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", write_report)
        train(out)
    return out


def steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not OF_THE_MACHINE.fullmatch(key)} for line in lines
    ]


def assert_same(run: Path, other: Path) -> None:
    """Bit for bit the same newest checkpoint and metrics."""
    assert steps(run)[-1] == steps(other)[-1]
    newest = str(steps(run)[-1])
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(folder / "checkpoints" / newest / name) for folder in (run, other))
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for tensor, expected in theirs.items():
            assert torch.equal(ours[tensor], expected), tensor
    assert rows(run) == rows(other)


def test_a_run_is_complete(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.toml", "tokenizer.json", "metrics.jsonl", "checkpoints", "samples", "plots"}
    losses = [row["validation_loss"] for row in rows(whole) if "validation_loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert (whole / "samples" / "00000012.txt").read_text().startswith("def ")
    checkpoint = whole / "checkpoints" / "12"
    assert {path.name for path in checkpoint.iterdir()} == {"model.safetensors", "optimizer.safetensors", "run.json"}
    model = load(whole)
    assert model.kind == "run"
    np.testing.assert_array_equal(
        model.params["embed"]["embedding"], load_file(checkpoint / "model.safetensors")["embed.weight"].numpy()
    )


@pytest.mark.parametrize("step", [1, 8])  # before the first checkpoint, and two steps after the second
def test_resuming_is_bitwise(
    step: int, train: Callable[..., None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = TorchEngine.step, []

    def stepped(engine: TorchEngine, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) > step:
            raise ZeroDivisionError
        return original(engine, batch)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(TorchEngine, "step", stepped)
        train(tmp_path)
    torch.rand(100)  # the state of torch's own generator is nothing that counts
    train(tmp_path, resume=True)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("damage", ["truncated", "altered", "record", "changed record", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, train: Callable[..., None], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    newest = tmp_path / "checkpoints" / "12"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    if damage == "truncated":
        (newest / "optimizer.safetensors").write_bytes(content[:-100])
    elif damage == "altered":
        content[-100] ^= 1
        (newest / "optimizer.safetensors").write_bytes(content)
    elif damage == "record":
        (newest / "run.json").write_text((newest / "run.json").read_text()[:40])
    elif damage == "changed record":
        (newest / "run.json").write_text((newest / "run.json").read_text().replace('"step": 12', '"step": 13'))
    else:
        (newest / "model.safetensors").unlink()
    capsys.readouterr()
    train(tmp_path, resume=True)
    printed = capsys.readouterr().out
    assert f"warning: {newest} is damaged: " in printed and "from step 10" in printed
    assert_same(tmp_path, whole)
    assert [path.name.split("-")[0] for path in (tmp_path / "damaged").iterdir()] == ["12"]


def test_a_converted_run_says_why_it_cannot_be_resumed(train: Callable[..., None], whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "run", "jaxlm")
    with pytest.raises(UserError, match="parameters from a conversion, without an optimizer to resume"):
        train(tmp_path / "run", resume=True)
    assert load(tmp_path / "run").kind == "run"


def parts_of(decoder: Decoder) -> list[Part]:
    train = config.Train()
    return [Part("model", train, make_optimizer(decoder, train), decoder)]


def saved(folder: Path, losses: dict[int, float | None], keep: int = 2) -> Checkpointer:
    """Checkpoints of a tiny decoder at these steps, with these validation losses."""
    checkpointer = Checkpointer(folder, keep)
    decoder = init_params(Decoder(config.Model(vocab_size=11, d_model=8, n_layers=1, n_heads=2)), seed=0)
    for step, loss in losses.items():
        checkpointer.save(parts_of(decoder), TrainState(step), {}, loss)
    return checkpointer


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 1.5, 7: None}
    assert saved(tmp_path, losses).steps() == [2, 6, 7]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved(tmp_path, {1: None})
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoints/2: checkpoint not written: .*(earlier ones are intact)"):
            saved(tmp_path, {2: None})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    checkpointer = saved(tmp_path, {1: None})
    decoder = Decoder(config.Model(vocab_size=11, d_model=16, n_layers=1, n_heads=2))
    with pytest.raises(UserError, match=r"embed.weight is \[11, 8\], the config asks for \[11, 16\]"):
        checkpointer.restore(parts_of(decoder), print)


def test_a_checkpoint_of_jax_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "5" / "params").mkdir(parents=True)
    decoder = Decoder(config.Model(vocab_size=11, d_model=16, n_layers=1, n_heads=2))
    with pytest.raises(UserError, match="a checkpoint of the JAX backend"):
        Checkpointer(tmp_path).restore(parts_of(decoder), print)


def test_what_this_machine_has_not_is_refused(tmp_path: Path) -> None:
    cfg = config.Config(out_dir=str(tmp_path), model=config.Model(vocab_size=11))
    with pytest.raises(UserError, match=r"mesh.fsdp = 8: the torch backend trains on one device"):
        TorchEngine(dataclasses.replace(cfg, mesh=config.Mesh(fsdp=8)), make_recipe(cfg))
    assert pick_device("cpu").type == "cpu"
    for name in {"cuda", "mps"} - {pick_device("auto").type}:
        with pytest.raises(UserError, match=f"torch.device = '{name}': PyTorch finds no such device"):
            pick_device(name)


def test_dropout_depends_on_seed_step_and_microbatch(rng: np.random.Generator) -> None:
    """With a learning rate that changes nothing, only the mask moves the loss."""
    decoder = init_params(Decoder(config.Model(vocab_size=11, d_model=8, n_layers=1, n_heads=2, dropout=0.5)), seed=0)
    train = config.Train(learning_rate=1e-30, weight_decay=0.0, warmup_steps=0, microbatches=2)
    row = {"tokens": rng.integers(0, 11, (1, 16)), "targets": rng.integers(0, 11, (1, 16))}
    row |= {"positions": np.arange(16)[None], "segments": np.ones((1, 16), int), "weights": np.ones((1, 16))}
    batch = {name: torch.tensor(array).repeat(2, 1) for name, array in row.items()}
    batch = {name: tensor.int() if name != "weights" else tensor.float() for name, tensor in batch.items()}
    seen: list[float] = []

    def spied(part: Any) -> Any:
        loss, sums = objective(part)
        seen.append(float(sums["loss"].detach()))
        return loss, sums

    objective = loss_fn(decoder, train)
    for seed in (0, 1, 0):
        step, state = make_step(spied, make_optimizer(decoder, train), train, seed=seed), TrainState()
        for _ in range(2):
            state, _ = step(state, batch)
    assert len({*seen[:8]}) == 8 and seen[:4] == seen[8:]


def test_no_jax_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from jaxlm.recipes import make_recipe, start
from jaxlm.report.run_page import write_report
import torch_ref.train.engine, torch_ref.infer.generate
print(*sorted({"jax", "flax", "optax", "orbax"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.soak  # the C++ compiler takes half a minute
def test_a_compiled_step_is_the_same(toml: Path, tmp_path: Path) -> None:
    """In a process of its own: torch.compile cannot trace the shape checks that pytest puts around every call."""
    for compiled in ("false", "true"):
        options = ["numerics.params=float64", "numerics.compute=float64", "model.dropout=0.0", "train.steps=5"]
        overrides = [f'out_dir="{tmp_path / compiled}"', f"torch.compile={compiled}", *options]
        code = f"""
from jaxlm.config import toml as config_file
from jaxlm.recipes import start
start.run(config_file.load({str(toml)!r}, {overrides!r}), backend="torch")
"""
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=240)
    plain, compiled = rows(tmp_path / "false"), rows(tmp_path / "true")
    for row, other in zip(plain, compiled, strict=True):
        assert row == pytest.approx(other, rel=FLOAT64.allowed)


@pytest.mark.usefixtures("one_device")
def test_both_backends_begin_with_the_parameters_of_another_run(train, whole, toml, tmp_path):
    importlib.import_module("jaxlm.train.engine")  # here, and not while the main thread also compiles: `ast` races
    options = (f'train.init_from="{whole}"', "train.steps=1", "model.dropout=0.0")
    train(tmp_path / "torch", *options)
    start.run(config_file.load(toml, [f'out_dir="{tmp_path / "jax"}"', *options]))
    ours, theirs = (rows(tmp_path / backend)[0] for backend in ("jax", "torch"))
    assert ours["step"] == theirs["step"] == 1
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["loss"] < rows(whole)[0]["loss"] - 0.01
