"""Reinforcement learning on eight devices: the tokens, rewards, updates and parameters of one, in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.infer.model import Model
from jaxlm.recipes import start
from jaxlm.recipes.rollouts.phases import Phase
from jaxlm.recipes.rollouts.source import RolloutData
from jaxlm.run.metrics import read_metrics
from jaxlm.text.tokenizer import Tokenizer
from parity_tests import pairs
from parity_tests.test_rl import SOAK, compare_phases, graded_here, settings
from parity_tests.tolerances import FLOAT64
from tests.devices import on_devices

AUTOUSE = (graded_here,)  # the rewards of that file
THREE, EIGHT = config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=1, fsdp=8)
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"iterations": 2, "kl": "loss"}),
    "ppo": ("ppo", {"iterations": 2, "kl": "reward", "kl_kind": "k1"}),
    "ppo, shared trunk": ("ppo", {"iterations": 2, "value_trunk": "shared"}),
}
PHASES = 3


def trained(cfg: config.Config, devices: int) -> list[Phase]:
    """The phases of `jaxlm train` on so many devices."""
    made, begin = [], RolloutData.begin_phase

    def keep(data: RolloutData, number: int, engine: Any) -> None:
        begin(data, number, engine)
        made.append(data.phase)

    with pytest.MonkeyPatch.context() as patch, on_devices(devices):
        patch.setattr(RolloutData, "begin_phase", keep)
        start.run(cfg)
    return made


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        ("grpo", THREE),
        *(pytest.param(stage, THREE, marks=SOAK) for stage in STAGES if stage != "grpo"),
        *(pytest.param(stage, EIGHT, marks=SOAK) for stage in STAGES),
    ],
    ids=lambda value: value if isinstance(value, str) else f"fsdp {value.fsdp}",
)
def test_eight_devices_are_one(stage: str, mesh: config.Mesh, tmp_path: Path, rng: np.random.Generator) -> None:
    recipe, rl = STAGES[stage]
    cfg = settings("dense", {**rl, "evaluate_every": 2, "held_out": 4})
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, n_kv_heads=2))
    widened = jax.tree.map(lambda leaf: np.asarray(leaf, "float64"), pairs.random_params(cfg.model, rng))
    Model(cfg, widened, Tokenizer.bytes_level()).save(tmp_path / "start")
    train = dataclasses.replace(cfg.train, init_from=str(tmp_path / "start"), steps=PHASES * cfg.rl.iterations)
    options: dict[str, Any] = {"sample": config.Sample(prompts=()), "log": config.Log(every=1), "train": train}
    cfg = dataclasses.replace(cfg, recipe=recipe, tokenizer=config.Tokenizer(kind="bytes"), **options)

    phases, rows, models = {}, {}, {}
    for devices, on in ((1, config.Mesh()), (8, mesh)):
        folder = tmp_path / str(devices)
        phases[devices] = trained(dataclasses.replace(cfg, mesh=on, out_dir=str(folder)), devices)
        rows[devices] = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        models[devices] = jaxlm.load(folder).params

    assert len(phases[8]) == PHASES and any(phase.advantages.any() for phase in phases[1])
    compare_phases(phases[1], phases[8])
    names = [name for name in rows[1][0] if name.endswith(("loss", "grad_norm", "variance", "share"))]
    assert ("value_grad_norm" in names) == (recipe == "ppo")
    ours, theirs = ([[row[name] for name in names] for row in rows[devices]] for devices in (8, 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(*map(jax.tree.leaves, (models[1], models[8])), strict=True):
        FLOAT64.check(pairs.error(np.asarray(a), np.asarray(b)), "the policy")
