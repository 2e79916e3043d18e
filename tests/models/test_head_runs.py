"""A model with a head of its own is a run: it trains, resumes, loads, converts, is planned, counted and proved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.cli.app import app
from jaxlm.config import toml
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.llama2c.model_bin import header_of
from jaxlm.counts.parameters import account
from jaxlm.errors import UserError
from jaxlm.infer.model import Model
from jaxlm.parity.both_sides import compare_sides
from jaxlm.parity.inputs import make_inputs, random_params
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.plan.plan_one import make
from jaxlm.plan.topology import parse
from jaxlm.recipes import make_recipe, start  # two threads that import at once break Python's ast
from jaxlm.recipes.init_from import initial_params
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine
from tests.toy_stage import draw
from torch_ref.models.decoder import Decoder as TorchDecoder

IMPORTED = (engine,)
BYTES = Tokenizer.bytes_level()
HEADS = ("value", "reward", "classes", "verifier")
TOY: dict[str, Any] = {
    "recipe": "tests.head_stage:recipe",
    "model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_ff": 32, "tie_embeddings": False},
    "data": {"seq_len": 16},
    "train": {"steps": 6, "batch_size": 8, "warmup_steps": 0, "schedule": "constant", "learning_rate": 1e-2},
    "eval": {"every": 0, "batches": 2},
    "log": {"every": 1},
}


def toy(out: Path, head: str, **sections: Any) -> config.Config:
    model = {**TOY["model"], "head": head, "classes": 3, **sections.get("model", {})}
    return toml.from_dict({**TOY, **sections, "model": model, "out_dir": str(out)})


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose trunk others take."""
    cfg = toy(Path("none"), "lm", model={"vocab_size": BYTES.vocab_size}, recipe="pretrain")
    folder = tmp_path_factory.mktemp("language") / "lm"
    Model(cfg, random_params(cfg.model), BYTES).save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, language: Path) -> dict[str, Path]:
    """A reward model that JAX trained, a classifier that PyTorch trained."""
    folder = tmp_path_factory.mktemp("heads")
    begun = {**TOY["train"], "init_from": str(language)}
    start.run(toy(folder / "reward", "reward", train=begun))
    start.run(toy(folder / "classes", "classes", train=begun), backend="torch")
    return {"reward": folder / "reward", "classes": folder / "classes"}


def places() -> list[np.ndarray]:
    batch = draw(toy(Path("none"), "reward"), 0, range(2))
    return [batch[name] for name in ("tokens", "positions", "segments")]


def scores(model: Any) -> np.ndarray:
    how: Any = {"documents": 2, "method": "score_documents"}
    return np.asarray(model.decoder.apply({"params": model.params}, *map(jnp.asarray, places()), **how)[0])


@pytest.mark.parametrize("head", ["reward", "classes"])
def test_a_run_loads_and_converts(runs: dict[str, Path], tmp_path: Path, head: str) -> None:
    model = jaxlm.load(runs[head])
    assert model.config.model.head == head and f"{head} head" in repr(model)
    assert "head" not in model.params and "score" in model.params
    wanted = scores(model)
    assert wanted.shape == (2, 2, model.config.model.outputs) and np.ptp(wanted) > 0
    for layout in ("torch", "jaxlm"):
        jaxlm.convert(runs[head], tmp_path / layout, layout)
        np.testing.assert_array_equal(scores(jaxlm.load(tmp_path / layout)), wanted)
    np.testing.assert_allclose(model.to_torch().score_documents(*tensors(), 2)[0].numpy(), wanted, atol=1e-5)


def tensors() -> Any:
    import torch

    return [torch.tensor(x) for x in places()]


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_run_resumes_bit_for_bit(runs: dict[str, Path], tmp_path: Path, backend: Any) -> None:
    head = {"jax": "reward", "torch": "classes"}[backend]
    whole = dataclasses.replace(jaxlm.load(runs[head]).config, out_dir=str(tmp_path / "run"))
    start.run(dataclasses.replace(whole, train=dataclasses.replace(whole.train, steps=3)), backend=backend)
    start.run(whole, resume=True, backend=backend)
    trees = [jaxlm.load(path).params for path in (tmp_path / "run", runs[head])]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    other = dataclasses.replace(whole, model=dataclasses.replace(whole.model, head="value"))
    with pytest.raises(UserError, match=f"model.head is 'value', the run was made with '{head}'"):
        start.run(other, resume=True, backend=backend)


@pytest.mark.parametrize("head", HEADS)
def test_the_trunk_of_a_language_model_is_taken(language: Path, head: str) -> None:
    cfg = toy(Path("none"), head, model={"vocab_size": BYTES.vocab_size})
    lent = jaxlm.load(language)
    params = initial_params(cfg, BYTES, str(language), cfg.model)
    assert params.keys() == lent.params.keys() - {"head"} | {"score"}
    for name in params.keys() - {"score"}:
        jax.tree.map(np.testing.assert_array_equal, params[name], lent.params[name])
    assert np.ptp(params["score"]["kernel"]) > 0 and not params["score"]["bias"].any()


def test_a_language_model_takes_no_other_head(runs: dict[str, Path]) -> None:
    cfg = dataclasses.replace(jaxlm.load(runs["reward"]).config.model, head="lm")
    with pytest.raises(UserError, match=r"head is 'reward' there and 'lm' here .*name the one that it began with"):
        initial_params(toy(Path("none"), "lm"), BYTES, str(runs["reward"]), cfg)


def test_what_needs_a_language_model_refuses_in_one_line(runs: dict[str, Path], tmp_path: Path) -> None:
    reward, says = jaxlm.load(runs["reward"]), r"model.head = 'reward': {} needs a language model .*name one with head"
    with pytest.raises(UserError, match=says.format("generation")):
        reward.generate("a")
    with pytest.raises(UserError, match=says.format("generation")):
        reward.generate("a", backend="torch")
    with pytest.raises(UserError, match=says.format("log_probs")):
        reward.log_probs("a b")
    for recipe in ("pretrain", "sft", "answers", "grpo", "ppo", "dpo"):
        with pytest.raises(UserError, match=says.format(f"the recipe {recipe}")):
            make_recipe(toy(tmp_path, "reward", recipe=recipe))
    for layout in (*FAMILIES, "hf"):
        with pytest.raises(UserError) as caught:
            jaxlm.convert(runs["reward"], tmp_path / "out", layout)
        assert "head = 'reward'" in f"{caught.value.message} {caught.value.hint}", layout
    with pytest.raises(UserError, match=r"the llama2c layout has no place for model\.head"):
        header_of(reward.config.model)
    with pytest.raises(UserError, match=r"model\.classes = 1"):
        toy(tmp_path, "classes", model={"classes": 1})


def test_it_is_counted(capsys: pytest.CaptureFixture[str], runs: dict[str, Path]) -> None:
    cfg = jaxlm.load(runs["classes"]).config
    language = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, head="lm"))
    ours, theirs, d, v = account(cfg), account(language), cfg.model.d_model, cfg.model.vocab_size
    assert theirs.total - ours.total == v * d - (3 * d + 3)
    assert theirs.matmul - ours.matmul == v * d - 3 * d
    app(["info", str(runs["classes"])], standalone_mode=False)
    assert f"{ours.total:,}" in capsys.readouterr().out


def test_it_is_planned(runs: dict[str, Path]) -> None:
    """Two devices of this machine: what the compiler says is there, and counts the rows once."""
    cfg = jaxlm.load(runs["reward"]).config
    plan = make(cfg, parse("cpu:1"), name="reward", compiling=False)
    assert plan.estimate.parameters == account(cfg).total * 4


@pytest.mark.parametrize("head", [pytest.param("value", marks=pytest.mark.soak), "reward"])
def test_it_is_proved(runs: dict[str, Path], tmp_path: Path, head: str) -> None:
    """Forward, gradients, updates and the stage's own objective; a fault in the head of one side is seen."""
    if head == "reward":
        report = jaxlm.check_parity(runs["reward"], out=tmp_path, dtypes=("float64",))
        assert {"update 1", "stage loss", "stage update 1"} <= {one.level for one in report.findings}
    else:
        path = tmp_path / "value.toml"
        path.write_text(toml.to_toml(toy(tmp_path / "x", head, recipe="pretrain", model={"vocab_size": 97})))
        levels = ("forward", "loss", "gradients", "generation")
        report = jaxlm.check_parity(path, out=tmp_path, dtypes=("float64",), levels=levels)
    assert report.same, report.verdict
    shown = {one.level for one in report.findings}
    assert {"forward", "loss", "gradients"} <= shown and "generation" not in shown
    assert "score.weight" in {one.name for one in report.findings if one.level == "gradients"}


def test_a_fault_in_the_head_is_seen(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias left out on one side."""
    model = jaxlm.load(runs["reward"])
    monkeypatch.setattr(TorchDecoder, "unembedding", lambda self: (self.score.weight.T, None))
    sides = JaxSide(model.config, model.params), TorchSide.of(model.config, model.params)
    inputs = make_inputs(model.config.model, levels=("forward",))
    (findings,) = compare_sides(sides, inputs, ("float64",))
    assert [one.name for one in findings if not one.ok] == ["logits"]
