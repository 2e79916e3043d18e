"""Where two sides choose other experts, and how near to a tie float64 was there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import config
from jaxlm.config.model_parts import MoE
from jaxlm.convert.open_model import load
from jaxlm.parity.compare import Finding
from jaxlm.parity.inputs import make_inputs, random_params
from jaxlm.parity.routing import compare_routing, margins
from jaxlm.parity.sides import transformers_side
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.sides.torch_side import TorchSide
from jaxlm.parity.sides.transformers_side import HuggingFaceSide
from jaxlm.parity.trace import ARRIVES, RETURNS, Arrays
from parity_tests.families import exported
from parity_tests.families_moe import EXAMPLES
from parity_tests.pairs import model
from parity_tests.tolerances import RATIO
from torch_ref.ops.moe import router as torch_router

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"n_experts": 8, "top_k": 2},
    "sigmoid, bias, groups": {
        "n_experts": 8,
        "top_k": 3,
        "router": "sigmoid",
        "selection_bias": True,
        "n_groups": 4,
        "top_groups": 2,
    },
}


def routed(name: str) -> config.Model:
    """Two layers of experts."""
    return model(pattern=("attention+moe",), n_layers=2, moe=ROUTERS[name])


@functools.cache
def forward_of_jax(cfg: config.Model, dtype: str, params: Callable[[config.Model], Any] = random_params) -> Arrays:
    """Outputs of all modules, compiled once."""
    return JaxSide(config.Config(model=cfg), params(cfg)).forward(dtype, make_inputs(cfg).rows)


def compared(cfg: config.Model, dtype: str, params: Callable[[config.Model], Any] = random_params) -> list[Finding]:
    """The findings of jaxlm against its mirror."""
    theirs = TorchSide.of(config.Config(model=cfg), params(cfg)).forward(dtype, make_inputs(cfg).rows)
    golden, ours = (forward_of_jax(cfg, one, params) for one in ("float64", dtype))
    return [*compare_routing(dtype, golden, ours, theirs, cfg)]


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_rounding_is_no_alarm(name: str, dtype: str) -> None:
    """bfloat16 moves some tokens to other experts in every model."""
    found = compared(routed(name), dtype)
    assert [one.name for one in found] == [f"layers.{i}.ffn.router" for i in range(2)]
    assert all(one.ok for one in found), found
    if dtype == "float64":
        assert all(one.error == 0 and one.note.endswith(" tokens") for one in found), found
    if dtype == "bfloat16":
        assert all(one.error > 0 and "against" in one.note for one in found), found


def near_tie(cfg: config.Model) -> Any:
    """Experts 2 and 5 have routers that differ in the last place."""
    params = random_params(cfg)
    kernel = params["layers_0"]["ffn"]["router"]["kernel"]
    kernel[:, 5] = np.nextafter(kernel[:, 2], np.where(np.arange(32) % 2, np.inf, -np.inf).astype(np.float32))
    return params


def test_a_near_tie_is_named_with_its_margin() -> None:
    cfg = model(pattern=("attention+moe",), n_layers=1, layer_loop="unroll", moe={"n_experts": 6, "top_k": 1})
    (one,) = compared(cfg, "float32", near_tie)
    assert one.ok and 0 < one.error < 1e-6, one
    assert one.note.partition("] ")[2] in ("experts [2] against [5]", "experts [5] against [2]"), one.note


@pytest.mark.parametrize(("name", "dtype"), [("softmax", "bfloat16"), *((name, "float64") for name in ROUTERS)])
def test_a_wrong_choice_is_an_alarm(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best expert is passed over; the next scores are far behind it."""
    top_k = torch_router._top_k  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(torch_router, "_top_k", lambda values, k: top_k(values, k + 1)[..., 1:])
    first = compared(routed(name), dtype)[0]
    assert not first.ok and first.error > 10 * first.bound, first


def test_a_bias_left_out_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 the reach is that of rounding, however far the scores of the other side are off."""
    route = torch_router.route
    monkeypatch.setattr(torch_router, "route", lambda logits, bias, **options: route(logits, None, **options))
    first = compared(routed("sigmoid, bias, groups"), "float64")[0]
    assert not first.ok and first.error > 1e-2, first


def of_transformers(family: str, folder: Path) -> tuple[JaxSide, HuggingFaceSide, config.Model]:
    """Both sides of the first example of a family."""
    one = next(one for one in EXAMPLES if one.family == family)
    loaded = load(exported(one, folder))
    theirs = HuggingFaceSide(loaded.config, folder / family, loaded.config.model.rope_layout)
    return JaxSide(loaded.config, loaded.params), theirs, loaded.config.model


@pytest.mark.parametrize("family", ["dots1"])
def test_transformers_chooses_the_same_experts(family: str, tmp_path: Path) -> None:
    ours, theirs, cfg = of_transformers(family, tmp_path)
    rows = make_inputs(cfg).rows
    golden = ours.forward("float64", rows)
    found = [*compare_routing("float64", golden, golden, theirs.forward("float64", rows), cfg)]
    assert len(found) == sum(cfg.halves(kind).ffn_name == "moe" for kind in cfg.pattern) * cfg.repeats
    assert all(one.error == 0 for one in found), found
    forwards = (side.forward("bfloat16", rows) for side in (ours, theirs))
    found = [*compare_routing("bfloat16", golden, *forwards, cfg)]
    assert all(one.ok for one in found) and any(one.error > 0 for one in found), found


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "of its own"])
def test_transformers_computes_with_the_experts_that_it_is_given(
    forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 its own choice would part from ours in a near tie, and the experts would look guilty."""
    if not forced:
        monkeypatch.setattr(transformers_side, "replayed", lambda arriving, *_: arriving)
    ours, theirs, cfg = of_transformers("gpt_oss", tmp_path)
    rows = make_inputs(cfg).rows
    golden = ours.replay("float64", rows, None)
    inputs = {name: x for (kind, name), x in golden.items() if kind == ARRIVES and (x.dtype.kind == "f" or "#" in name)}
    both = [side.replay("bfloat16", rows, inputs) for side in (ours, theirs)]
    real = rows["segments"] > 0
    event = (RETURNS, "layers.1.ffn")
    exact = np.asarray(golden[event])[real]
    mine, other = (float(np.linalg.norm(found[event][real] - exact)) for found in both)
    assert (other < RATIO.allowed * mine) == forced, (mine, other)


def forward(experts: list[list[int]], biased: list[list[float]]) -> Arrays:
    """Of one router."""
    name = "layers.0.ffn.router"
    return {f"{name}#experts": np.array([experts]), f"{name}#biased": np.array([biased])}


def test_the_token_furthest_from_a_tie_is_shown() -> None:
    exact = [[0.5, 0.3, 0.2], [0.4, 0.3999, 0.2001], [0.2, 0.5, 0.3], [0.4, 0.35, 0.25]]
    near = [[0.5, 0.3, 0.2], [0.3999, 0.4, 0.2001], [0.2, 0.5, 0.3], [0.34, 0.41, 0.25]]
    golden = forward([[0], [0], [3], [0]], exact)
    cfg = model(pattern=("attention+moe",), n_layers=1, moe={"n_experts": 3, "top_k": 1})
    (one,) = compare_routing("bfloat16", golden, golden, forward([[0], [1], [3], [1]], near), cfg)
    assert (one.ok, one.note) == (True, "2 of 3 tokens, at [0, 1] experts [0] against [1]")
    assert one.error == pytest.approx(1e-4) and one.bound == pytest.approx(2e-4)
    off = [*near[:3], [0.39, 0.36, 0.25]]  # chooses the second although nothing moves it there
    (one,) = compare_routing("bfloat16", golden, golden, forward([[0], [1], [3], [1]], off), cfg)
    assert (one.ok, one.note) == (False, "2 of 3 tokens, at [0, 3] experts [0] against [1]")
    assert (one.error, one.bound) == (pytest.approx(0.05), pytest.approx(0.02))


def test_margins_by_hand() -> None:
    scores = np.array([[0.9, 0.1, 0.5, 0.45, 0.8, 0.16, 0.0, 0.2]])
    assert margins(scores, MoE(n_experts=8, top_k=2)) == pytest.approx(0.8 - 0.5)
    assert margins(scores, MoE(n_experts=8, top_k=8)) == np.inf
    grouped = MoE(n_experts=8, top_k=2, n_groups=4, top_groups=2)  # sums 1.0, 0.95, 0.96, 0.2
    assert margins(scores, grouped) == pytest.approx(0.96 - 0.95)
    three = dataclasses.replace(grouped, top_groups=3, top_k=3)
    assert margins(scores, three) == pytest.approx(0.5 - 0.45)
