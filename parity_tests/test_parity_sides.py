"""`jaxlm parity` between any two: transformers on its own folder, two folders, and the operation that is guilty."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from jaxlm import config
from jaxlm.cli.app import app
from jaxlm.convert.families import FAMILIES, llama
from jaxlm.convert.open_model import Model
from jaxlm.convert.rows import Row
from jaxlm.errors import UserError
from jaxlm.parity import Report, check
from jaxlm.parity.bisect import Replayed
from jaxlm.parity.inputs import make_inputs, random_params
from jaxlm.parity.sides.jax_side import JaxSide
from jaxlm.parity.sides.torch_side import TorchSide
from parity_tests import families, families_moe, families_ssm, pairs
from parity_tests.families import Example, exported

EXAMPLES = (*families.EXAMPLES, *families_moe.EXAMPLES, *families_ssm.EXAMPLES)
FIRST = tuple({one.family: one for one in reversed(EXAMPLES)}.values())
"""One example of each family."""
KINDS = ("llama", "gpt2", "mixtral", "gpt_oss", "jamba")
"""One of each kind: plain, fused maps, experts that are fused in memory, masks of its own, state spaces. `make soak`
has all."""
ONE_DOCUMENT = ("mamba", "mamba2", "jamba")
"""Families to whose models transformers cannot tell where a document begins."""
FORWARD: dict[str, Any] = {"levels": ("config", "weights", "forward"), "dtypes": ("float64",)}
Folder = Callable[..., Path]


@pytest.mark.parametrize("one", [one for one in FIRST if one.family in KINDS], ids=str)
def test_transformers_is_the_same_in_float64(one: Example, tmp_path: Path) -> None:
    """On packed rows where the model knows documents; with gradients for what `llama` and `gpt2` say of all."""
    levels = ("weights", "forward", *(("loss", "gradients") if one.family in ("llama", "gpt2") else ()))
    report = check(exported(one, tmp_path), levels=levels, dtypes=("float64",))
    assert (report.verdict, report.levels, report.parts) == ("same", list(levels), ())
    assert report.inputs.startswith("plain" if one.family in ONE_DOCUMENT else "packed")
    compared = {finding.name for finding in report.findings if finding.level == "forward"}
    for i in range(one.model.n_layers):
        assert {f"layers.{i}", f"layers.{i}.mixer"} <= compared
    assert {"embed", "logits"} <= compared


@pytest.mark.soak
@pytest.mark.parametrize("one", EXAMPLES, ids=str)
def test_transformers_is_the_same_in_every_dtype(one: Example, tmp_path: Path) -> None:
    assert check(exported(one, tmp_path)).verdict == "same"


def test_transformers_trains_and_generates_the_same(tmp_path: Path) -> None:
    """Updates by canonical decay, and its own cache."""
    report = check(exported(families.EXAMPLES[0], tmp_path), levels=("update", "generation"), dtypes=("float32",))
    assert (report.verdict, report.levels) == ("same", ["update 1", "update 20", "generation"])
    assert report.who == "jaxlm against transformers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A Hugging Face folder, sound or with other keys in its config.json or other tensors."""
    sound = exported(families.EXAMPLES[0], tmp_path_factory.mktemp("sound"))

    def make(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None, **keys: Any) -> Path:
        if change is None and not keys:
            return sound
        other = tmp_path_factory.mktemp("other")
        said = json.loads((sound / "config.json").read_text())
        for key, value in keys.items():
            said[key] = {**said[key], **value} if isinstance(value, dict) else value
        (other / "config.json").write_text(json.dumps(said))
        tensors = load_file(sound / "model.safetensors")
        save_file(change(tensors) if change else tensors, other / "model.safetensors")
        return other

    return make


def swapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"
    return tensors | {gate: tensors[up], up: tensors[gate]}


def rounded(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}


FAULTS: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "theta": (
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5},
        "rope_theta",
        "layers.0.mixer.o_proj",
        "layers.0.mixer, between q_proj, k_proj, v_proj and o_proj (rotation, mask, softmax or grouping of the heads)",
        "rope_theta is 500000 instead of 10000, as its config says",
    ),
    "eps": (
        {"rms_norm_eps": 1e-6},
        "norm_eps",
        "layers.0.mixer_norm",
        "layers.0.mixer_norm",
        "norm_eps is 1e-06 instead of 1e-05, as its config says",
    ),
    "gate and up": (
        {"change": swapped},
        "",
        "layers.1.ffn.up_proj",
        "layers.1.ffn.up_proj",
        "ffn.gate_proj.weight and ffn.up_proj.weight of layer 1: gate and up are swapped",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_folder_is_named(name: str, folder: Folder) -> None:
    """Two folders: the option or the tensor, the first difference, and the operation."""
    changed, option, first, guilty, explanation = FAULTS[name]
    report = check(folder(), folder(**changed), **FORWARD)
    wrong = [finding for finding in report.findings if not finding.ok]
    assert [one.name for one in wrong if one.level == "config"][:1] == ([option] if option else [])
    assert [one.name for one in wrong if one.level == "weights"] == (
        [] if option else ["layers.1.ffn.gate_proj.weight", "layers.1.ffn.up_proj.weight"]
    )
    assert next(one.name for one in wrong if one.level == "forward") == first
    assert report.guilty is not None and report.guilty.what == guilty
    assert f"first guilty: {guilty}" in report.verdict
    assert report.explanations[0].startswith(explanation)


def test_rows_that_are_wrong_both_ways_are_seen_by_transformers(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are mapped by the same rows on both sides and agree; what is computed does not."""
    rows, other = llama.rows, {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def wrong(cfg: Any) -> list[Row]:
        turned = []
        for row in rows(cfg):
            kind = next((kind for kind in other if kind in row.theirs[0]), "")
            theirs = row.theirs[0].replace(kind, other[kind]) if kind else row.theirs
            turned.append(Row(row.ours, theirs, *row.transforms))
        return turned

    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(llama.FAMILY, rows=wrong))
    report = check(folder(), **FORWARD)
    assert all(finding.ok for finding in report.findings if finding.level == "weights")
    assert report.guilty is not None
    assert report.guilty.what == "layers.0.ffn, between up_proj, gate_proj and down_proj (activation or gate)"


def test_another_dtype_is_allowed_one_rounding(folder: Folder) -> None:
    """The weights differ by what bfloat16 rounds, and so the model is another one."""
    report = check(folder(), folder(rounded, dtype="bfloat16", torch_dtype="bfloat16"), **FORWARD)
    weights = [finding for finding in report.findings if finding.level == "weights"]
    assert all(finding.ok and finding.error > 0 for finding in weights), weights
    assert "float32 in jaxlm, bfloat16 in transformers" in weights[0].note
    assert not report.same


def test_who_computes_the_other(folder: Folder, tmp_path: Path) -> None:
    sound = folder()
    for computed_by, name in (("jaxlm", "jaxlm of B"), ("torch", "torch_ref"), ("hf", "transformers")):
        report = check(sound, computed_by=computed_by, **FORWARD)
        assert (report.verdict, report.who) == ("same", f"jaxlm against {name}")
    cfg = families.EXAMPLES[0].model
    loaded = Model(config.Config(model=cfg), random_params(cfg), None, "run")
    with pytest.raises(UserError, match="transformers only computes a Hugging Face folder"):
        check(loaded, computed_by="hf")
    with pytest.raises(UserError, match="implementation 'tf' is not known"):
        check(loaded, computed_by="tf")
    report = check(loaded, sound, **FORWARD, out=tmp_path)
    assert {finding.level for finding in report.findings if not finding.ok} == {"weights", "forward"}
    page = (tmp_path / "parity.html").read_text()
    assert "A: run in memory, computed by jaxlm" in page and "first: <b>embed</b>" in page
    told = json.loads((tmp_path / "parity.json").read_text())
    assert told["guilty"] == "embed" and len(told["replayed"]) > 20


def test_the_command(folder: Folder) -> None:
    run = lambda *words: CliRunner().invoke(app, ["parity", str(folder()), *words])  # noqa: E731
    few = ["--levels", "config,weights,forward", "--dtypes", "float64"]
    assert run(*few).exit_code == 0
    other = folder(rms_norm_eps=1e-6)
    result = run(str(other), *few)
    assert result.exit_code == 1 and "norm_eps is 1e-05 in A, 1e-06 in B" in result.stdout
    for wrong, told in (
        (["--levels", "forwards"], "level 'forwards' is not known"),
        (["--dtypes", "float16"], "dtype 'float16' is not known"),
        (["--prompt", "hello"], "there is no tokenizer.json for your text"),
        (["--text", "nothing.txt"], "nothing.txt"),
    ):
        with pytest.raises(UserError, match=told):
            raise run(*wrong).exception or AssertionError("no mistake was seen")


MODELS: dict[str, dict[str, Any]] = {
    "experts": {"pattern": ("attention+moe",), "moe": {"n_shared": 1}},
    "state space": {"pattern": ("mamba+mlp", "mamba2")},
    "everything else": {"qk_norm": True, "norm_position": "post", "sink_tokens": 2, "tie_embeddings": False},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_sound_model_has_no_guilty_operation(options: dict[str, Any]) -> None:
    """On the same input, each operation of torch_ref is that of jaxlm, and they happen in one order."""
    sides, inputs, settings = two_sides(**options)
    replayed = Replayed(sides, inputs, settings.model)
    parts = replayed.parts("float64")
    assert all(part.ok for part in parts), [part for part in parts if not part.ok]
    seen = [(part.kind, part.name) for part in parts]
    events = [event for event in sides[0].replay("float64", inputs.rows, None) if event in seen]
    assert events == seen


def two_sides(**options: Any) -> Any:
    settings = config.Config(model=pairs.model(n_layers=2, **options))
    params = random_params(settings.model)
    sides = JaxSide(settings, params), TorchSide.of(settings, params)
    return sides, make_inputs(settings.model), settings


def test_two_guilty_operations_are_both_found() -> None:
    """And none of their victims: an eps in the first norm, and a tensor of the last layer."""
    sides, inputs, settings = two_sides()
    tensors = dict(sides[1].weights())
    tensors["layers.1.ffn.up_proj.weight"] = tensors["layers.1.ffn.up_proj.weight"] * np.float32(1.001)
    tensors["layers.0.mixer_norm.weight"] = tensors["layers.0.mixer_norm.weight"] * np.float32(1.001)
    parts = Replayed((sides[0], TorchSide(settings, tensors)), inputs, settings.model).parts("float64")
    assert [part.name for part in parts if not part.ok and part.kind == "returns"] == [
        "layers.0.mixer_norm",
        "layers.1.ffn.up_proj",
    ]


def test_the_operation_that_rounds_too_often_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 in which one product is computed in bfloat16."""
    sides, inputs, settings = two_sides()
    from torch_ref.ops import ffn

    gated = ffn.gated
    monkeypatch.setattr(ffn, "gated", lambda kind, gate, up: gated(kind, gate, up.bfloat16().to(up.dtype)))
    parts = Replayed(sides, inputs, settings.model).parts("float32")
    wrong = [part for part in parts if not part.ok]
    assert wrong[0].what == "layers.0.ffn, between up_proj, gate_proj and down_proj (activation or gate)"
    assert {part.name.partition(".ffn.down_proj")[0] for part in wrong} <= {"layers.0", "layers.1"}
    assert len(wrong) <= 6


def test_replaying_changes_nothing_of_the_choice_of_experts() -> None:
    """Without a near tie: what arrives at the experts is exchanged as a whole."""
    sides, inputs, _ = two_sides(**MODELS["experts"])
    golden = sides[0].replay("float64", inputs.rows, None)
    forced = {name: x for (kind, name), x in golden.items() if kind == "arrives" and x.dtype.kind == "f"}
    name = "layers.1.ffn.experts#weights"
    halved = forced | {name: 0.5 * forced[name]}
    for side in sides:
        whole, half = (side.replay("float64", inputs.rows, given) for given in (forced, halved))
        np.testing.assert_allclose(
            half["returns", "layers.1.ffn.experts"], 0.5 * whole["returns", "layers.1.ffn.experts"]
        )
        np.testing.assert_array_equal(half["returns", "layers.0"], whole["returns", "layers.0"])


def test_a_report_says_what_explains(tmp_path: Path) -> None:
    """Explanations stand in the verdict, on the page and in the JSON."""
    wrong = dataclasses.replace(next(iter(check_of_two().findings)), error=1.0)
    report = Report("x", "y", "z", (wrong,), {}, explanations=("the other rotary layout <explains> all", "second"))
    report.write(tmp_path)
    assert report.verdict.endswith("; the other rotary layout <explains> all")
    assert "<li>the other rotary layout &lt;explains&gt; all" in (tmp_path / "parity.html").read_text()
    assert json.loads((tmp_path / "parity.json").read_text())["explanations"][1] == "second"


def check_of_two() -> Report:
    from jaxlm.parity.compare import Finding

    return Report("x", "y", "z", (Finding("float64", "forward", "embed", 0.0, 1e-10),), {})


def test_torch_and_jax_do_not_disturb_each_other(folder: Folder) -> None:
    """The default dtypes of both processes are as before."""
    before = torch.get_default_dtype(), jax.config.jax_enable_x64
    check(folder(), **FORWARD)
    assert (torch.get_default_dtype(), jax.config.jax_enable_x64) == before
