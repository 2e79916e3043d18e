"""A stage that no other file knows: it trains, resumes, is planned and proved, on one device and on eight."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.recipes import make_recipe, start
from jaxlm.recipes.start import completer
from jaxlm.train.engine import JaxEngine
from jaxlm.train.loop import FrozenFile, train
from jaxlm.train.program import abstract_inputs, training_program
from jaxlm.train.recipe import parameter_name
from tests.devices import on_devices

pytestmark = pytest.mark.usefixtures("on_one_device")
TOY = {
    "recipe": "tests.toy_stage:recipe",
    "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 32},
    "data": {"seq_len": 16},
    "train": {"steps": 8, "batch_size": 8, "warmup_steps": 1, "learning_rate": 3e-2},
    "checkpoint": {"every": 3},
    "eval": {"every": 4, "batches": 2},
    "sample": {"prompts": ()},
    "log": {"every": 1},
}


def toy(out, **sections) -> config.Config:
    cfg = toml.from_dict({**TOY, "out_dir": str(out), **sections})
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir=str(out.parent / "cache")))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("toy"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "make_recipe", lambda cfg: made.append(cfg) or make_recipe(cfg))
        start.run(toy(folder / "run"))
    assert len(made) == 1, "one recipe is handed on: a teacher is opened once"
    return folder / "run"


def test_what_moves_and_what_does_not(trained, rows, leaves):
    arrays = leaves(trained)
    moments = [name for name in arrays if name.startswith("optimizer") and "mu" in name]
    assert not any("layers" in name for name in moments if "'model'" in name), "what does not move has no moments"
    assert any("layers" in name for name in moments if "'value'" in name)
    assert not any("teacher" in name for name in arrays), "frozen trees are not saved"
    metrics = [row for row in rows(trained) if "loss" in row]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert {"value_grad_norm", "value_learning_rate"} <= metrics[0].keys()
    assert metrics[-1]["value_learning_rate"] == pytest.approx(metrics[-1]["learning_rate"] / 2)
    assert [row["step"] for row in rows(trained) if "validation_error" in row] == [4, 8]


def test_checkpoints_fall_on_the_ends_of_phases(trained):
    saved = sorted(int(path.name) for path in (trained / "checkpoints").iterdir())
    assert saved == [4, 6, 8], "due after 3 and 6 updates, phases of 2"


def test_a_resumed_run_is_the_same_bit_for_bit(trained, tmp_path, leaves):
    half = dataclasses.replace(toy(tmp_path / "run"), train=dataclasses.replace(toy(tmp_path).train, steps=8))
    with pytest.MonkeyPatch.context() as patch:
        original = JaxEngine.step

        def step(engine, batch):
            if int(engine.state.step) == 5:
                raise ZeroDivisionError
            return original(engine, batch)

        patch.setattr(JaxEngine, "step", step)
        with pytest.raises(ZeroDivisionError):
            start.run(half)
    start.run(half, resume=True)
    expected, found = leaves(trained), leaves(tmp_path / "run")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)


def test_eight_devices_are_one(tmp_path):
    losses = {}
    for devices, mesh in ((1, {"data": 1}), (8, {"data": 2, "fsdp": 4})):
        cfg = toml.from_dict({**TOY, "out_dir": str(tmp_path / str(devices)), "mesh": mesh})
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=262))
        with on_devices(devices):
            engine = JaxEngine(cfg, make_recipe(cfg), lambda *_: [])
            batches = make_recipe(cfg).data(None).batches(batch_size=8, rows=None)
            losses[devices] = [engine.fetch([engine.step(next(batches))])[0]["loss"] for _ in range(3)]
    assert losses[8] == pytest.approx(losses[1], rel=1e-5)


def test_another_frozen_tree_is_named(trained):
    cfg = toy(trained)
    cfg, recipe, source = start.open_stage(cfg, make_recipe(cfg), resume=True)
    engine = JaxEngine(cfg, recipe, completer(cfg, source.tokenizer))
    with pytest.raises(UserError, match=r"the frozen teacher, other/run, is not the one of the checkpoint"):
        train(cfg, recipe, source, engine, resume=True, frozen={"teacher": FrozenFile("other/run", "ab")})


def test_the_program_takes_every_tree(tmp_path):
    cfg = toy(tmp_path)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=262))
    layout = Layout.from_config(config.Mesh(data=2, fsdp=4), jax.local_devices())
    state, frozen, batch = abstract_inputs(cfg, layout, training_program(cfg, layout, make_recipe(cfg)))
    assert state.params.keys() == {"model", "value"} and frozen.keys() == {"teacher"}
    assert batch["labels"].shape == (8, 2) and batch["tokens"].shape == (8, 16)


def test_a_batch_array_without_axes_is_refused():
    with pytest.raises(UserError, match="the batch's rewards has no axes"):
        Layout.from_config(config.Mesh()).place({"rewards": np.zeros((2, 3))}, 2, {"tokens": ("batch", "seq")})


@pytest.mark.parametrize(("name", "hint"), [("pretran", "did you mean 'pretrain'"), ("no.such:thing", "No module")])
def test_an_unknown_recipe_is_one_line(name, hint):
    with pytest.raises(UserError, match=hint):
        make_recipe(config.Config(recipe=name))


@pytest.mark.parametrize(
    "path", ["layers.slot_0.mixer.q_proj.kernel", "layers_3.mixer.q_proj.kernel", "layers.3.mixer.q_proj.weight"]
)
def test_a_parameter_has_one_name_in_both_frameworks(path):
    assert parameter_name(path) == "layers.mixer.q_proj.weight"
