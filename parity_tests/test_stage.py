"""A stage is proved by its own loss and updates: several trained trees, a filter, a frozen teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config
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


def test_both_frameworks_train_the_toy_stage_alike(cfg: config.Config) -> None:
    findings = list(compare_stage(cfg, random_params(cfg.model)))
    assert {finding.level for finding in findings} == {"stage loss", "stage update 1", "stage update 20"}
    assert [finding for finding in findings if not finding.ok] == []
    assert any(finding.name.startswith("value: layers.0") for finding in findings)


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
