"""Comparisons that take long: a large model in two rounds, and what is known of one that was ended."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.native import to_torch
from jaxlm.parity import both_sides, check
from jaxlm.parity.both_sides import OF_PARAMETERS, compare_sides
from jaxlm.parity.inputs import LEVELS, Inputs, make_inputs, random_params
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.trace import DTYPES, Trace
from parity_tests.test_parity_tool import settings


def test_a_large_model_is_compared_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, asked = settings(n_layers=1), []
    params, inputs = random_params(cfg.model, 0), make_inputs(cfg.model)

    class Mirror(TorchSide):
        def trace(self, dtype: str, inputs: Inputs, progress: Callable[[str], None]) -> Trace:
            asked.append(inputs.levels)
            return super().trace(dtype, inputs, progress)

    sides = JaxSide(cfg, params), Mirror(cfg, dict(to_torch(params, cfg.model)))
    (at_once,) = compare_sides(sides, inputs, DTYPES[:1], model=cfg.model)
    monkeypatch.setattr(both_sides, "LARGE", 0)
    outputs, of_parameters = compare_sides(sides, inputs, DTYPES[:1], model=cfg.model)
    assert asked == [inputs.levels, tuple(one for one in LEVELS if one not in OF_PARAMETERS), OF_PARAMETERS]
    assert {(one.level, one.name): one.ok for one in (*outputs, *of_parameters)} == {
        (one.level, one.name): True for one in at_once
    }


def test_what_is_known_is_kept_if_the_comparison_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = TorchSide.trace

    def ended(side: TorchSide, dtype: str, *rest: Any) -> Trace:
        if dtype == "bfloat16":
            raise KeyboardInterrupt
        return trace(side, dtype, *rest)

    monkeypatch.setattr(TorchSide, "trace", ended)
    path = tmp_path / "small.toml"
    path.write_text(toml.to_toml(dataclasses.replace(settings(), data=config.Data(cache_dir=str(tmp_path)))))
    with pytest.raises(KeyboardInterrupt):
        check(path, out=tmp_path / "out", levels=("forward", "loss"))
    known = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert (known["same"], known["verdict"]) == (False, "unfinished: the same so far, in float64, float32")
    assert {(one["dtype"], one["ok"]) for one in known["findings"]} == {("float64", True), ("float32", True)}
    assert known["verdict"] in (tmp_path / "out" / "parity.html").read_text()
