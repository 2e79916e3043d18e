"""A run begun in one framework goes on in the other: rows, losses, parameters, moments are those of one run."""

from __future__ import annotations

import errno
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import training_state
from jaxlm.convert.open_model import load
from jaxlm.convert.training_state import Training, convert_state
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.recipes import make_recipe, start
from jaxlm.run.checkpoints import checkpoint_folder
from jaxlm.run.metrics import OF_THE_MACHINE
from jaxlm.run.torch_checkpoint import MODEL, OPTIMIZER, RUN, write_record
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.engine import JaxEngine
from jaxlm.train.optim import make_optimizer
from jaxlm.train.recipe import Models
from jaxlm.train.step import init_state
from parity_tests.pairs import error
from parity_tests.tolerances import FLOAT64
from tests.devices import on_devices
from torch_ref.train.engine import TorchEngine

TOML = """
[model]
d_model = 16
n_layers = 2
n_heads = 2
n_kv_heads = 1
d_ff = 32
[tokenizer]
kind = "bytes"
[data]
source = "{source}"
cache_dir = "{cache}"
seq_len = 16
validation_fraction = 0.2
[train]
steps = 6
batch_size = 4
microbatches = 2
warmup_steps = 2
learning_rate = 1e-2
clip_norm = 0.5
weight_decay = 0.3
[eval]
every = 3
batches = 2
[sample]
prompts = []
[checkpoint]
every = 3
[log]
every = 1
[numerics]
params = "float64"
compute = "float64"
matmul = "highest"
"""
CASES = {
    "scanned, tied": ('model.layer_loop="scan"',),
    "unrolled, experts with selection bias": (
        'model.layer_loop="unroll"',
        'model.pattern=["attention+mlp", "attention+moe"]',
        "model.tie_embeddings=false",
        'model.biases=["qkv"]',
        "model.moe.n_experts=4",
        "model.moe.selection_bias=true",
        "model.moe.bias_update_rate=0.01",
        'train.schedule="wsd"',
    ),
}


def models_of(cfg: config.Config) -> Models:
    return make_recipe(cfg).models


carry = functools.partial(convert_state, models_of=models_of)
OTHER: dict[config.Backend, config.Backend] = {"jax": "torch", "torch": "jax"}


class Finished(NamedTuple):
    """A run, and the tokens of the batches that its last process saw."""

    folder: Path
    batches: list[np.ndarray]


Train = Callable[..., Finished]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """A function that trains, on one device, the tiny model or the run that lies in a folder."""
    home, batches = tmp_path_factory.mktemp("state"), []
    source = Path(__file__).parents[1] / "torch_ref" / "ops"
    (home / "tiny.toml").write_text(TOML.format(source=source, cache=home / "cache"))

    def run(out: Path, backend: config.Backend, *overrides: str, resume: bool = False) -> Finished:
        batches.clear()
        path = out / "config.toml" if resume else home / "tiny.toml"
        start.run(toml.load(path, [f'out_dir="{out}"', *overrides]), resume=resume, backend=backend)
        return Finished(out, list(batches))

    with pytest.MonkeyPatch.context() as patch, on_devices(1):
        for engine in (JaxEngine, TorchEngine):

            def step(self: Any, batch: Any, original: Any = engine.step) -> Any:
                batches.append(batch["tokens"].copy())
                return original(self, batch)

            patch.setattr(engine, "step", step)
        yield run


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, config.Backend], Finished]:
    """A function from a case to the six steps that nobody disturbs."""

    @functools.cache
    def make(case: str, backend: config.Backend) -> Finished:
        return train(tmp_path_factory.mktemp("whole"), backend, *CASES[case])

    return make


def newest(run: Path) -> Training:
    """Everything of the newest checkpoint of either backend."""
    where, settings = checkpoint_folder(run), toml.load(run / "config.toml")
    read = training_state._read_torch if (where / RUN).is_file() else training_state._read_jax
    return read(where, settings, models_of(settings))


def tensors(training: Training, models: Models) -> dict[str, np.ndarray]:
    """Parameters and moments of all trees, by the names of torch_ref."""
    kinds = {"": training.params, "first ": training.moments[0], "second ": training.moments[1]}
    return {
        f"{kind}{name}": array
        for kind, trees in kinds.items()
        for name, array in training_state._tensors(trees, models).items()
    }


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not OF_THE_MACHINE.fullmatch(key)} for line in lines
    ]


def differences(run: Path, undisturbed: Path) -> dict[str, float]:
    """Relative errors of all tensors of the newest checkpoint and of all metrics."""
    models = models_of(toml.load(run / "config.toml"))
    (mine, other), (ours, theirs) = map(newest, (run, undisturbed)), map(rows, (run, undisturbed))
    assert mine.step == other.step and mine.run.keys() == other.run.keys()
    apart = {"progress": 0, "clock": 0}  # the best loss is a float of its own, and time passes
    assert {**mine.run, **apart} == {**other.run, **apart}
    errors = {"updates": error(np.array(mine.updates), np.array(other.updates))}
    found, expected = tensors(mine, models), tensors(other, models)
    errors |= {name: error(found[name], expected[name]) for name in expected if expected[name].any()}
    assert found.keys() == expected.keys() and len(errors) > 30
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, same in zip(ours, theirs, strict=True):
        errors |= {f"{key} of step {row['step']}": error(np.array(row[key]), np.array(same[key])) for key in row}
    return errors


@pytest.mark.parametrize("begun", OTHER)
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on(case: str, begun: config.Backend, whole: Any, train: Train, tmp_path: Path) -> None:
    """Three steps in one framework and three in the other are six in one."""
    undisturbed = whole(case, begun)
    summary = carry(undisturbed.folder, tmp_path / "run", OTHER[begun], step=3)
    assert str(summary).startswith(f"{tmp_path / 'run'}: step 3 for --backend {OTHER[begun]}, ")
    carried = newest(tmp_path / "run")
    assert carried.validation_loss == pytest.approx(rows(tmp_path / "run")[3]["validation_loss"], rel=1e-15)
    resumed = train(tmp_path / "run", OTHER[begun], resume=True)
    np.testing.assert_array_equal(resumed.batches, undisturbed.batches[3:])
    for name, found in differences(tmp_path / "run", undisturbed.folder).items():
        FLOAT64.check(found, name)


@pytest.mark.parametrize("fault", ["moments swapped", "one update too few", "moments not transposed"])
def test_a_planted_fault_is_seen(
    fault: str, whole: Any, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = training_state._read_jax

    def wrong(where: Path, settings: config.Config, models: Models) -> Training:
        training = read(where, settings, models)
        if fault == "moments swapped":
            return training._replace(moments=training.moments[::-1])
        if fault == "one update too few":
            return training._replace(updates=training.updates - 1)
        q_proj = training.moments[0]["model"]["layers"]["slot_0"]["mixer"]["q_proj"]
        q_proj["kernel"] = q_proj["kernel"].reshape(2, 16, 16).swapaxes(1, 2).reshape(2, 16, 2, 8)
        return training

    monkeypatch.setattr(training_state, "_read_jax", wrong)
    undisturbed = whole("scanned, tied", "jax").folder
    carry(undisturbed, tmp_path / "run", "torch", step=3)
    monkeypatch.undo()
    train(tmp_path / "run", "torch", resume=True)
    with pytest.raises((AssertionError, UserError), match=r"error .* exceeds|NaN or infinite"):
        for name, found in differences(tmp_path / "run", undisturbed).items():
            FLOAT64.check(found, name)


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_there_and_back_is_bitwise(layer_loop: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """float32, random values of their own in every leaf of parameters and moments."""
    model = config.Model(vocab_size=11, d_model=8, n_layers=2, n_heads=2, layer_loop=layer_loop)  # pyright: ignore
    settings = config.Config(out_dir=str(tmp_path / "one"), model=model)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.toml").write_text(toml.to_toml(settings))
    (tmp_path / "one" / "metrics.jsonl").write_text('{"step": 7}\n')
    begin = init_state(init_params(Decoder(model), jax.random.key(0)), make_optimizer(settings.train))
    random = jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32) if leaf.ndim else leaf, (begin.params, begin.opt_state)
    )
    opt_state = optax.tree.set(random[1], None, count=jax.numpy.int32(5))
    checkpoints = Checkpointer(tmp_path / "one")
    number = jax.numpy.int32
    record = {"data": {"next": 7}, "progress": {"best": 1 / 3}}
    checkpoints.save(begin._replace(step=number(7), params=random[0], opt_state=opt_state, skipped=number(2)), record)
    checkpoints.close()

    carry(tmp_path / "one", tmp_path / "two", "torch")
    carry(tmp_path / "two", tmp_path / "three", "jax")
    carry(tmp_path / "three", tmp_path / "four", "torch")
    first, third = newest(tmp_path / "one"), newest(tmp_path / "three")
    assert (first.step, first.skipped, first.updates, first.run, first.validation_loss) == (7, 2, 5, record, None)
    assert first[:3] == third[:3] and first[5:] == third[5:]
    before, after = (tensors(one, models_of(settings)) for one in (first, third))
    assert before.keys() == after.keys() and len({array.tobytes() for array in before.values()}) == len(before) > 50
    for name, array in before.items():
        assert array.dtype == after[name].dtype == np.float32 and array.tobytes() == after[name].tobytes(), name
    for name in (MODEL, OPTIMIZER, RUN):
        two, four = (tmp_path / run / "checkpoints" / "7" / name for run in ("two", "four"))
        assert two.read_bytes() == four.read_bytes()
    assert (tmp_path / "four" / "metrics.jsonl").read_text() == '{"step": 7}\n'
    assert toml.load(tmp_path / "four" / "config.toml").out_dir == str(tmp_path / "four")
    np.testing.assert_array_equal(
        load(tmp_path / "two").params["embed"]["embedding"], first.params["model"]["embed"]["embedding"]
    )


def altered(path: Path, at: int = -9) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewritten(where: Path, file: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Change tensors, with a record that says that all is well."""
    arrays, record = load_file(where / file), json.loads((where / RUN).read_text())
    change(arrays)
    save_file(arrays, where / file)
    write_record(where, record["state"], record["run"], record["validation_loss"])


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


MISTAKES: dict[str, tuple[config.Backend, Callable[[Path], object], str]] = {
    "altered tensors": ("torch", lambda w: altered(w / OPTIMIZER), "6 is damaged: the checksum of optimizer.safetens"),
    "altered record": ("torch", lambda w: altered(w / RUN, 60), "6 is damaged"),
    "truncated": ("torch", lambda w: (w / MODEL).write_bytes((w / MODEL).read_bytes()[:-1]), "the checksum of model"),
    "half-copied": ("torch", lambda w: (w / OPTIMIZER).unlink(), "6 is damaged: .*optimizer.safetensors.*--step"),
    "weights only": ("torch", lambda w: [(w / name).unlink() for name in (RUN, OPTIMIZER)], "holds no optimiser state"),
    "a count apart": (
        "torch",
        lambda w: rewritten(w, OPTIMIZER, lambda x: x.update({"step.embed.weight": np.array(5, np.float32)})),
        "its parameters have seen different numbers of updates",
    ),
    "a moment missing": (
        "torch",
        lambda w: rewritten(w, OPTIMIZER, lambda x: x.pop("exp_avg.embed.weight")),
        r"optimizer.safetensors, exp_avg: 1 tensor missing: embed.weight",
    ),
    "a moment too many": (
        "torch",
        lambda w: rewritten(w, OPTIMIZER, lambda x: x.update({"max.embed.weight": x["exp_avg.embed.weight"]})),
        "max is no part of AdamW's state",
    ),
    "NaN": (
        "torch",
        lambda w: rewritten(w, OPTIMIZER, lambda x: x["exp_avg_sq.embed.weight"].fill(np.nan)),
        "exp_avg_sq: 1 tensor NaN or infinite: embed.weight",
    ),
    "another dtype": (
        "torch",
        lambda w: rewritten(w, MODEL, lambda x: x.update({"embed.weight": x["embed.weight"].astype(np.float32)})),
        "embed.weight is float32, numerics.params is float64",
    ),
    "altered arrays": ("jax", lambda w: altered(largest(w / "params"), 200), "6 is damaged: .*--step: 3"),
    "no optimiser": ("jax", lambda w: shutil.rmtree(w / "optimizer"), "holds no optimiser state"),
    "half an optimiser": ("jax", lambda w: largest(w / "optimizer").unlink(), "6 is damaged"),
    "no record": ("jax", lambda w: shutil.rmtree(w / "run"), "6 is damaged"),
    "no checkpoint": (
        "jax",
        lambda w: [shutil.rmtree(path) for path in w.parent.iterdir()],
        "checkpoints: no checkpoi",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_is_not_whole_is_refused(name: str, whole: Any, tmp_path: Path) -> None:
    backend, harm, message = MISTAKES[name]
    shutil.copytree(whole("scanned, tied", backend).folder, tmp_path / "run")
    harm(tmp_path / "run" / "checkpoints" / "6")
    with pytest.raises(UserError, match=message):
        carry(tmp_path / "run", tmp_path / "out", OTHER[backend])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_mistakes_of_the_user(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = whole("scanned, tied", "torch").folder
    with pytest.raises(UserError, match="is a checkpoint of the torch backend already"):
        carry(run, tmp_path / "out", "torch")
    with pytest.raises(UserError, match=r"no step 4 \(there are: 3, 6\)"):
        carry(run, tmp_path / "out", "jax", step=4)
    with pytest.raises(UserError, match="is or holds the source"):
        carry(run, run.parent, "jax", overwrite=True)
    convert(run, tmp_path / "weights", "torch")
    with pytest.raises(UserError, match="not a run"):
        carry(tmp_path / "weights", tmp_path / "out", "jax")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        carry(run, tmp_path / "weights", "jax")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training_state, "write_record", full)
    with pytest.raises(UserError, match="the disk is full, nothing was kept"):
        carry(whole("scanned, tied", "jax").folder, tmp_path / "out", "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize("begun", OTHER)
def test_the_wrong_backend_is_told_the_command(begun: config.Backend, whole: Any, train: Train) -> None:
    run = whole("scanned, tied", begun).folder
    with pytest.raises(UserError, match=f"`jaxlm convert {run} DST --to jaxlm --backend {OTHER[begun]}` carries it"):
        train(run, OTHER[begun], resume=True)
