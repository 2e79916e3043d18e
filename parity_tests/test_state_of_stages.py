"""A run of several trained trees goes on in the other framework: the curve is that of one run, float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert import training_state
from jaxlm.convert.training_state import convert_state
from jaxlm.errors import UserError
from jaxlm.recipes import distill, make_recipe, ppo, start  # two threads that import at once break Python's ast
from jaxlm.run.metrics import read_metrics
from jaxlm.train import engine
from jaxlm.train.recipe import Models
from parity_tests import pairs
from parity_tests.test_distill_runs import HIDDEN, STUDENT, save
from parity_tests.tolerances import FLOAT64
from tests.devices import on_devices

IMPORTED = distill, ppo, engine
OTHER: dict[config.Backend, config.Backend] = {"jax": "torch", "torch": "jax"}
STEPS = 8
STAGES: dict[str, dict[str, Any]] = {
    "distill": {
        "model": {"n_layers": 2},
        "data": {"seq_len": 64},
        "distill": HIDDEN,
        "train": {"batch_size": 2},
    },
    "ppo": {
        "data": {"seq_len": 12},
        "rl": {
            "task": "reverse(length=2)",
            "rewards": ["exact_text", "length(per_token=0.05) * -0.5"],
            "prompts": 4,
            "group": 2,
            "max_new_tokens": 4,
            "iterations": 2,
            "kl": "reward",
            "kl_kind": "k1",
            "kl_target": 0.1,
            "held_out": 4,
        },
        "train": {"batch_size": 8},
    },
}
"""A projection beside the model; a value model beside it, and a weight that follows its target."""
WATCHED = {
    "distill": ("loss", "divergence", "grad_norm", "projection_grad_norm"),
    "ppo": ("loss", "value_loss", "reward", "kl_weight", "grad_norm", "value_grad_norm", "length"),
}


def models_of(cfg: config.Config) -> Models:
    return make_recipe(cfg).models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trees")
    save(folder / "teacher")
    save(folder / "start", **STUDENT, tie_embeddings=True)
    lines = [f'{{"prompt": "say {i}", "completion": "{"abc"[i % 3] * (1 + i % 5)}"}}' for i in range(40)]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path, recipe: str, name: str) -> config.Config:
    tree: dict[str, Any] = {
        "model": STUDENT | {"max_seq_len": 64},
        "tokenizer": {"kind": "bytes"},
        "data": {"validation_fraction": 0.2} | ({"source": str(folder / "talks.jsonl")} if recipe == "distill" else {}),
        "distill": {"teacher": str(folder / "teacher")} if recipe == "distill" else {},
        "train": {
            "init_from": str(folder / "start") if recipe == "ppo" else "",
            "steps": STEPS,
            "warmup_steps": 1,
            "learning_rate": 1e-2,
        },
        "eval": {"every": 0, "batches": 2},
        "sample": {"prompts": ()},
        "log": {"every": 1},
        "checkpoint": {"every": STEPS // 2},
        "numerics": {"params": "float64", "compute": "float64", "matmul": "highest"},
    }
    stage = STAGES[recipe]
    merged = {key: {**tree.get(key, {}), **stage.get(key, {})} for key in tree.keys() | stage.keys()}
    return toml.from_dict({"recipe": recipe, "out_dir": str(folder / name), **merged})


def train(cfg: config.Config, backend: config.Backend, **options: Any) -> list[dict[str, Any]]:
    with on_devices(1):
        start.run(cfg, backend=backend, **options)
    return [row for row in read_metrics(Path(cfg.out_dir) / "metrics.jsonl") if "loss" in row]


def apart(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], recipe: str) -> dict[str, float]:
    """Errors of the figures of all steps."""
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [*range(1, STEPS + 1)]
    sides = ({key: np.array([row[key] for row in rows]) for key in WATCHED[recipe]} for rows in (ours, theirs))
    mine, other = sides
    return {key: pairs.error(mine[key], other[key]) for key in WATCHED[recipe]}


@pytest.fixture(scope="module")
def whole(folder: Path) -> Callable[[str, config.Backend], list[dict[str, Any]]]:
    """A function from a stage and a backend to the figures of a run that nobody disturbs."""
    return functools.cache(lambda recipe, begun: train(settings(folder, recipe, f"{recipe}-{begun}"), begun))


@pytest.mark.parametrize("begun", OTHER)
@pytest.mark.parametrize("recipe", STAGES)
def test_a_run_of_several_trees_goes_on(recipe: str, begun: config.Backend, folder: Path, whole: Any) -> None:
    """Half of it in one framework and half in the other, as in one."""
    undisturbed, carried = whole(recipe, begun), settings(folder, recipe, f"{recipe}-{begun}-carried")
    convert_state(folder / f"{recipe}-{begun}", carried.out_dir, OTHER[begun], models_of, step=STEPS // 2)
    for key, error in apart(train(carried, OTHER[begun], resume=True), undisturbed, recipe).items():
        FLOAT64.check(error, f"{recipe}: {key} of {begun}, then {OTHER[begun]}")


@pytest.mark.parametrize(("recipe", "tree"), [("distill", "projection"), ("ppo", "value")])
def test_a_tree_without_its_moments_is_seen(
    recipe: str, tree: str, folder: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = training_state._read_jax

    def forgetful(*args: Any) -> Any:
        training = read(*args)
        first, second = training.moments
        return training._replace(moments=({**first, tree: jax.tree.map(np.zeros_like, first[tree])}, second))

    monkeypatch.setattr(training_state, "_read_jax", forgetful)
    undisturbed, wrong = whole(recipe, "jax"), settings(folder, recipe, f"{recipe}-forgotten")
    convert_state(folder / f"{recipe}-jax", wrong.out_dir, "torch", models_of, step=STEPS // 2)
    assert max(apart(train(wrong, "torch", resume=True), undisturbed, recipe).values()) > 1e-6


def test_trees_of_another_stage_are_refused(folder: Path, tmp_path: Path, whole: Any) -> None:
    def fewer(cfg: config.Config) -> Models:
        return models_of(cfg)._replace(maps={})

    def other(cfg: config.Config) -> Models:
        return models_of(dataclasses.replace(cfg, distill=dataclasses.replace(cfg.distill, layers=((0, 0), (1, 0)))))

    def partly(cfg: config.Config) -> Models:
        models = models_of(cfg)
        return models._replace(trained={"model": models.trained["model"]._replace(moves=lambda name: True)})

    whole("distill", "torch")
    for trees, message in (
        (fewer, r"projection/0_to_1.weight is of no tree that the stage trains \(it has: model\)"),
        (other, "0_to_0.weight is absent, the config asks for"),
        (partly, "only a part of the tree 'model' is trained"),
    ):
        with pytest.raises(UserError, match=message):
            convert_state(folder / "distill-torch", tmp_path / "out", "jax", trees)
    assert not (tmp_path / "out").exists()
