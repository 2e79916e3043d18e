"""PPO whose value is a map of the policy's own hidden states: whole runs, and the proof of the stage."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.parity.inputs import random_params
from jaxlm.parity.stage import compare_stage
from jaxlm.recipes import ppo
from parity_tests import pairs
from parity_tests.test_rl import REWARDED, SOAK, graded_here, runs_of_the_command, settings
from parity_tests.tolerances import FLOAT64
from torch_ref.recipes import ppo as torch_ppo

AUTOUSE = (graded_here,)  # the rewards of that file


@pytest.mark.parametrize("lora", [config.LoRA(), pytest.param(config.LoRA(rank=2, alpha=8.0), marks=SOAK)])
def test_values_of_the_policys_own_trunk(lora: config.LoRA, tmp_path: Path, rng: np.random.Generator) -> None:
    """Both losses move the trunk or its adapters, and the map from it has updates of its own."""
    rl = {"value_trunk": "shared", "iterations": 2, "evaluate_every": 10, "held_out": 4, **REWARDED}
    made, engines, cfg = runs_of_the_command("ppo", rl, tmp_path, rng, lora=lora)
    assert all(phase.advantages.any() for phase in made["jax"])
    trained, modules = jax.device_get(engines["jax"].state.params), engines["torch"].modules
    ours, theirs = (jaxlm.load(tmp_path / name) for name in made)
    for a, b in zip(*map(jax.tree.leaves, (theirs.params, ours.params)), strict=True):
        FLOAT64.check(pairs.error(np.asarray(a), np.asarray(b)), "the policy")
    kernel, begun = trained["value"]["head"]["kernel"], ppo.models(cfg).maps["value"].draw("value", 3, "float64")
    FLOAT64.check(pairs.error(modules["value"]["head"].weight.detach().numpy().T, kernel), "the map")
    assert np.abs(kernel - begun["head"]["kernel"]).min() > 1e-4, "every element has moved"


@pytest.mark.parametrize("fault", ["", "the values of the policy are constants"])
def test_the_stage_with_a_shared_trunk(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `jaxlm parity` proves of it, with adapters: the gradient of the values passes into the trunk."""
    cfg = settings("dense", {"value_trunk": "shared"})
    train = dataclasses.replace(cfg.train, init_from="unread")
    cfg = dataclasses.replace(cfg, recipe="ppo", train=train, lora=config.LoRA(rank=2))
    if fault:
        mapped = torch_ppo.mapped
        monkeypatch.setattr(torch_ppo, "mapped", lambda hidden_BTD, maps: mapped(hidden_BTD.detach(), maps))
    findings = [one for one in compare_stage(cfg, random_params(cfg.model)) if not one.ok]
    assert {one.level for one in findings} == ({"stage update 1", "stage update 20"} if fault else set())
    assert bool(fault) == any(one.name.startswith("model: layers.0") for one in findings)
