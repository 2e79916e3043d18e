"""A stage is proved by its own loss and updates: several trained trees, a filter, a frozen teacher."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm import cli, config
from jaxlm.config import toml
from jaxlm.parity.inputs import random_params
from jaxlm.parity.stage import compare_stage
from tests import toy_stage_torch

TOY = {
    "recipe": "tests.toy_stage:recipe",
    "model": {"vocab_size": 262, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 32},
    "train": {"warmup_steps": 1},
}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    folder: Path = tmp_path_factory.mktemp("stage")
    cfg = toml.from_dict({**TOY, "out_dir": str(folder / "run")})
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, cache_dir=str(folder)))


def test_the_command_proves_a_stage_that_it_does_not_know(cfg: config.Config, tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(toml.to_toml(cfg))
    only = ["--levels", "update", "--dtypes", "float64", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["jaxlm", "parity", str(tmp_path / "toy.toml"), *only])
        assert cli.main() == 0
    findings = json.loads((tmp_path / "parity.json").read_text())["findings"]
    of_stage = [finding for finding in findings if finding["level"].startswith("stage")]
    assert {finding["level"] for finding in of_stage} == {"stage loss", "stage update 1", "stage update 20"}
    assert any(finding["name"].startswith("value: layers.0") for finding in of_stage)


def test_a_twin_that_scales_one_term_is_seen(cfg: config.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    original = toy_stage_torch.objective

    def wrong(modules: Any, cfg: config.Config) -> Any:
        compute = original(modules, cfg)

        def scaled(batch: Any) -> Any:
            loss, sums = compute(batch | {"labels": batch["labels"] * 1.001})
            return loss, sums

        return scaled

    monkeypatch.setattr(toy_stage_torch, "objective", wrong)
    wrong_levels = {finding.level for finding in compare_stage(cfg, random_params(cfg.model)) if not finding.ok}
    assert wrong_levels == {"stage loss", "stage update 1", "stage update 20"}
