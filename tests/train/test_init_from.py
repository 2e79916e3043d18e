"""A new run with the parameters of another model: step, optimiser and data begin anew."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.convert.canonical import canonical
from jaxlm.convert.open_model import load
from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.recipes import start
from jaxlm.recipes.init_from import initial_params
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.engine import JaxEngine
from tests.devices import on_devices

pytestmark = pytest.mark.usefixtures("one_device")
PLAIN = ("model.dropout=0.0", "train.microbatches=1", "eval.every=0", "model.layer_loop=unroll")


def first_loss(run) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.fixture(scope="module")
def source(runs, tmp_path_factory):
    """A trained run, and the same model as a torch_ref and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("source")
    with on_devices(1):
        runs.train(folder / "run", *PLAIN, "train.learning_rate=1e-2", "train.steps=30")
    convert(folder / "run", folder / "torch", "torch")
    convert(folder / "run", folder / "llama", "llama")
    return folder


def test_only_the_parameters_are_taken(runs, source, tmp_path, monkeypatch):
    begun = []
    original = JaxEngine.step

    def step(engine, batch):
        begun.append((int(engine.state.step), np.array(engine.state.params["embed"]["embedding"])))
        return original(engine, batch)

    monkeypatch.setattr(JaxEngine, "step", step)
    options = (*PLAIN, f'train.init_from="{source / "llama"}"', "train.warmup_steps=0")
    runs.train(tmp_path, *options, "train.steps=2")
    assert [number for number, _ in begun] == [0, 1]
    np.testing.assert_array_equal(begun[0][1], load(source / "run").params["embed"]["embedding"])
    assert first_loss(tmp_path) < 5.0 < 5.5 < first_loss(source / "run")
    begun.clear()
    runs.train(tmp_path, *options, "train.steps=3", resume=True)
    assert [number for number, _ in begun] == [2], "a run that resumes has its own parameters"


@pytest.mark.parametrize("kind", ["run", "torch", "llama"])
def test_every_kind_of_model_is_the_same_tree(runs, source, tmp_path, kind):
    tokenizer = Tokenizer.from_file(source / "run" / "tokenizer.json")
    model = load(source / "run").config.model
    for layer_loop in ("scan", "unroll"):
        cfg = runs.config(tmp_path, f'train.init_from="{source / kind}"', "numerics.params=float64")
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(model, layer_loop=layer_loop))
        found = canonical(initial_params(cfg, tokenizer, cfg.train.init_from, cfg.model), cfg.model)
        expected = canonical(load(source / "run").params, model)
        assert [*found] == [*expected]
        for name, array in expected.items():
            assert found[name].dtype == np.float64
            np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_another_function_or_vocabulary_is_refused_by_name(runs, source, tmp_path):
    where = f'train.init_from="{source / "run"}"'
    for option, message in (
        ("model.d_ff=48", r"layers.0.d_ff is 32 there and 48 here"),
        ("model.rope_theta=1e6", r"layers.0.rope_theta is 10000.0 there and 1000000.0 here"),
        ("tokenizer.specials=false", r"vocab_size is 272 there and 256 here"),
    ):
        with pytest.raises(UserError, match=message):
            runs.train(tmp_path, *PLAIN, where, option)
    cfg = runs.config(tmp_path, *PLAIN, where)
    other = dataclasses.replace(cfg.tokenizer, kind="bpe", vocab_size=272)
    with pytest.raises(UserError, match=r"its tokenizer is another than that of \[tokenizer\] \(tokenizer.kind=file"):
        start.run(dataclasses.replace(cfg, tokenizer=other))
    assert not tmp_path.exists() or not any(tmp_path.iterdir())
