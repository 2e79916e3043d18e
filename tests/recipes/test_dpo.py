"""Learning from pairs through the front door: runs that learn, resume bit for bit, and mistakes in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

import jaxlm
from jaxlm import config
from jaxlm.config import toml
from jaxlm.data.preferences.reference_file import ReferenceFile
from jaxlm.data.preferences.rows import PairRows
from jaxlm.errors import UserError
from jaxlm.mesh import Layout
from jaxlm.plan.memory import estimate
from jaxlm.recipes import dpo, init_from, make_recipe, sft, start  # two threads that import at once break Python's ast
from jaxlm.train import engine
from jaxlm.train.program import abstract_inputs, training_program
from tests.devices import on_devices
from torch_ref.train.engine import TorchEngine

IMPORTED = dpo, sft, engine
pytestmark = pytest.mark.usefixtures("traced_once")
SOAK = pytest.mark.soak
WORDS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]
UNJUDGED = {"validation_fraction": 0.0}  # a run that nobody judges compiles one program less
FIGURES = ("loss", "grad_norm", "accuracy", "margin", "chosen_reward", "chosen_logp", "rejected_logp", "chosen_length")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_of(folder: Path, name: str, recipe: str, source: str, **sections: dict[str, Any]) -> config.Config:
    options: dict[str, dict[str, Any]] = {
        "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64},
        "tokenizer": {"kind": "bytes"},
        "data": {"source": source, "seq_len": 96, "validation_fraction": 0.2, "cache_dir": str(folder / "cache")},
        "train": {"steps": 4, "batch_size": 8, "warmup_steps": 0, "learning_rate": 3e-3, "schedule": "constant"},
        "eval": {"every": 0, "batches": 2},
        "sample": {"prompts": ()},
        "log": {"every": 1},
        "numerics": {"params": "float64", "compute": "float64"},
    }
    merged = {key: options.get(key, {}) | sections.get(key, {}) for key in options | sections}
    return toml.from_dict({"recipe": recipe, "out_dir": str(folder / name), **merged})


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen both answers, the polite and the other, and a folder of pairs."""
    folder = tmp_path_factory.mktemp("dpo")
    pairs = [
        {"prompt": f"say {a} {b}", "chosen": f"{a}, please", "rejected": f"{b}!"}
        for a in WORDS
        for b in WORDS
        if a != b
    ]
    write(folder / "pairs.jsonl", pairs)
    talks = [{"prompt": row["prompt"], "completion": row[side]} for row in pairs for side in ("chosen", "rejected")]
    start.run(run_of(folder, "start", "sft", write(folder / "talks.jsonl", talks), train={"steps": 8}))
    return folder


def dpo_run(begun: Path, folder: Path, *, loss: str = "dpo", **sections: dict[str, Any]) -> config.Config:
    train = {"init_from": str(begun / "start"), **sections.pop("train", {})}
    preference = {"loss": loss, "pairs_per_row": 2, **sections.pop("preference", {})}
    data = str(begun / "pairs.jsonl")
    return run_of(folder, "run", "dpo", data, train=train, preference=preference, **sections)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_first_step_is_where_the_reference_stands(begun: Path, tmp_path: Path, backend: Any) -> None:
    """Loss ln 2 to 1e-12, margins 0, and the run learns the order of held-out pairs."""
    options: Any = {"model": {"dropout": 0.2}, "preference": {"beta": 0.5}}  # it is off on both sides
    start.run(dpo_run(begun, tmp_path, train={"steps": 12}, **options), backend=backend)
    steps = [row for row in rows(tmp_path / "run") if "loss" in row]
    first, last = steps[0], steps[-1]
    assert abs(first["loss"] - np.log(2)) < 1e-12
    assert first["margin"] == 0 and first["chosen_reward"] == 0 and first["rejected_reward"] == 0
    assert last["loss"] < 0.6 and last["accuracy"] > 0.9
    assert first["chosen_length"] > first["rejected_length"] > 0
    judged = [row for row in rows(tmp_path / "run") if "validation_loss" in row][-1]
    assert judged["validation_accuracy"] > 0.9 and judged["validation_margin"] > 0
    assert {"validation_chosen_logp", "validation_rejected_logp"} <= judged.keys()


@pytest.mark.parametrize(
    ("loss", "backend"),
    [
        ("dpo", "jax"),
        ("kto", "torch"),
        pytest.param("kto", "jax", marks=SOAK),
        pytest.param("dpo", "torch", marks=SOAK),
    ],
)
def test_a_run_resumes_bit_for_bit(begun: Path, tmp_path: Path, loss: str, backend: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options: dict[str, Any] = {"loss": loss, "data": UNJUDGED}
    start.run(dpo_run(begun, whole, **options), backend=backend)
    start.run(dpo_run(begun, parts, **options, train={"steps": 2}), backend=backend)
    start.run(dpo_run(begun, parts, **options), resume=True, backend=backend)
    named = [*FIGURES, "desirable_reward", "divergence"]
    ours, theirs = (
        [[row.get(name) for name in named] for row in rows(folder / "run") if "loss" in row]
        for folder in (whole, parts)
    )
    assert ours == theirs and len(ours) == 4


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("loss", ["kto", pytest.param("dpo", marks=SOAK), pytest.param("orpo", marks=SOAK)])
def test_microbatches_are_the_same_update(begun: Path, tmp_path: Path, loss: str) -> None:
    """KTO's divergence is that of the whole batch, whatever it is cut into."""
    found = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        options = {"microbatches": parts, "learning_rate": 1e-2, "steps": 3}
        start.run(dpo_run(begun, folder, loss=loss, train=options, preference={"beta": 1.0}))
        found.append([[row["loss"], row["grad_norm"]] for row in rows(folder / "run") if "loss" in row])
        if loss == "kto":
            assert any(row.get("divergence") for row in rows(folder / "run")), "z is above 0 at some step"
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12, atol=1e-12)


THREE, EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 8}


@pytest.mark.parametrize(
    ("loss", "mesh"),
    [("dpo", THREE), *(pytest.param(loss, mesh, marks=SOAK) for loss, mesh in (("dpo", EIGHT), ("kto", THREE)))],
)
def test_eight_devices_are_one(begun: Path, tmp_path: Path, loss: str, mesh: dict[str, int]) -> None:
    """float64: losses and gradients of two updates, parameters split over three axes, or 8 times."""
    found = []
    for number, (count, sizes) in enumerate(((1, {}), (8, mesh))):
        with on_devices(count):
            options: Any = {"train": {"steps": 2}, "mesh": sizes, "data": UNJUDGED}
            start.run(dpo_run(begun, tmp_path / str(number), loss=loss, **options))
        found.append([[row["loss"], row["grad_norm"]] for row in rows(tmp_path / str(number) / "run") if "loss" in row])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_adapters_stand_on_their_reference(begun: Path, tmp_path: Path) -> None:
    """The base under the adapters is the reference: a frozen copy of it beside them makes the same updates."""
    found = []
    for name, reference in (("base", ""), ("copy", str(begun / "start"))):
        options: Any = {"lora": {"rank": 2}, "data": UNJUDGED, "train": {"steps": 3}}
        cfg = dpo_run(begun, tmp_path / name, preference={"reference": reference}, **options)
        assert bool(make_recipe(cfg).models.frozen) == bool(reference)
        start.run(cfg)
        found.append([[row["loss"], row["grad_norm"]] for row in rows(tmp_path / name / "run") if "loss" in row])
    assert abs(found[0][0][0] - np.log(2)) < 1e-12 and found[0][2][0] < np.log(2)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("loss", "backend"),
    [
        ("dpo", "jax"),
        ("kto", "torch"),
        pytest.param("kto", "jax", marks=SOAK),
        pytest.param("ipo", "torch", marks=SOAK),
    ],
)
def test_a_cached_reference_is_the_frozen_one(begun: Path, tmp_path: Path, loss: str, backend: Any) -> None:
    """Updates, figures of the held-out pairs, and of KTO the divergence of microbatches: float64, to 1e-12."""
    found, names = [], ("loss", "grad_norm", "chosen_reward", "validation_loss", "validation_margin", "divergence")
    for cached in (False, True):
        options: Any = {"train": {"steps": 3, "microbatches": 2}, "preference": {"cached_reference": cached}}
        start.run(dpo_run(begun, tmp_path / str(cached), loss=loss, **options), backend=backend)
        found.append([[row.get(name, 0.0) for name in names] for row in rows(tmp_path / str(cached) / "run")])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12, atol=1e-12)
    assert len(found[0]) == 4 and found[0][2][0] != found[0][0][0], "the policy has left its reference"


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=SOAK)])
def test_adapters_and_a_cached_reference(begun: Path, tmp_path: Path, backend: Any) -> None:
    """The base alone computes the numbers; the steps after that are those of the base that computes in each."""
    found = []
    for cached in (False, True):
        options: Any = {"train": {"steps": 3}, "preference": {"cached_reference": cached}, "lora": {"rank": 2}}
        start.run(dpo_run(begun, tmp_path / str(cached), data=UNJUDGED, **options), backend=backend)
        found.append([[row["loss"], row["grad_norm"]] for row in rows(tmp_path / str(cached) / "run") if "loss" in row])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)


@pytest.mark.parametrize("fault", ["another order of the answers", "chosen and rejected exchanged"])
def test_faults_of_the_cache_are_seen(begun: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loss is ln 2 only by the reference's own numbers."""
    original = PairRows.by_answer

    def wrong(self: Any, numbers: Any) -> Any:
        values = original(self, numbers)
        return np.roll(values, 2) if fault.startswith("another") else values.reshape(-1, 2)[:, ::-1].reshape(-1)

    monkeypatch.setattr(PairRows, "by_answer", wrong)
    options: Any = {"train": {"steps": 1}, "preference": {"cached_reference": True}}
    start.run(dpo_run(begun, tmp_path, data=UNJUDGED, **options), backend="torch")
    (first,) = rows(tmp_path / "run")
    assert abs(first["loss"] - np.log(2)) > 1e-3


def test_a_run_with_a_cache_resumes_bit_for_bit(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run, and one that resumes, read the file: the reference computes once for all of them."""
    options: Any = {"preference": {"cached_reference": True}}
    options["data"] = {**UNJUDGED, "cache_dir": str(tmp_path / "cache")}
    start.run(dpo_run(begun, tmp_path / "whole", **options), backend="torch")
    (file,) = (tmp_path / "cache" / "reference").iterdir()
    with safe_open(file, framework="numpy") as opened:
        stated = json.loads(opened.metadata()["facts"])
    assert stated["function"] == init_from.function_digest(jaxlm.load(tmp_path / "whole" / "run").config.model)
    monkeypatch.setattr(TorchEngine, "map_rows", lambda *_: pytest.fail("it is computed again"))
    start.run(dpo_run(begun, tmp_path / "parts", train={"steps": 2}, **options), backend="torch")
    start.run(dpo_run(begun, tmp_path / "parts", **options), resume=True, backend="torch")
    ours, theirs = (
        [[row[name] for name in FIGURES] for row in rows(tmp_path / name / "run") if "loss" in row]
        for name in ("whole", "parts")
    )
    assert ours == theirs and len(ours) == 4
    for content in (file.read_bytes()[:-9], b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file.name}: damaged: ") as error:
            start.run(dpo_run(begun, tmp_path / "again", **options), backend="torch")
        assert error.value.hint == "delete it: it is computed again"


def test_a_reference_is_its_weights_and_its_function() -> None:
    """The same weights read by another rotation are another reference; what only training uses is not."""
    model = config.Model(vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=16)
    ours = init_from.function_digest(model)
    assert ours == init_from.function_digest(dataclasses.replace(model, dropout=0.5, remat="full"))
    for change in (
        {"rope_theta": 500.0},
        {"norm_eps": 1e-3},
        {"rope_scaling": config.RopeScaling(kind="linear", factor=4.0)},
    ):
        assert init_from.function_digest(dataclasses.replace(model, **change)) != ours, change


def test_caches_of_others_are_refused(tmp_path: Path) -> None:
    """Another reference, other data, other numerics, a value that was changed."""
    facts = {"reference": "a" * 64, "pairs": "b" * 64, "numerics": "float32"}
    file, numbers = ReferenceFile.of(tmp_path, facts), {"train": np.arange(4.0)}
    assert file.read({"train": 4}) is None
    file.write(numbers)
    assert np.array_equal((file.read({"train": 4}) or {})["train"], numbers["train"])
    for name in facts:
        other = ReferenceFile.of(tmp_path, {**facts, name: "c" * 64})
        other.path.write_bytes(file.path.read_bytes())
        with pytest.raises(UserError, match=f"made with {name} .*, and this run has cccccccccccccccc"):
            other.read({"train": 4})
    changed = "damaged: its numbers are not those that were written"
    with pytest.raises(UserError, match=changed):
        file.read({"train": 6})
    content = bytearray(file.path.read_bytes())
    content[-1] ^= 1
    file.path.write_bytes(content)
    with pytest.raises(UserError, match=changed):
        file.read({"train": 4})


@pytest.mark.usefixtures("pages")
def test_kto_orders_held_out_pairs(begun: Path, tmp_path: Path) -> None:
    start.run(dpo_run(begun, tmp_path, loss="kto", train={"steps": 12}, preference={"beta": 0.5}))
    judged = [row for row in rows(tmp_path / "run") if "validation_loss" in row][-1]
    assert judged["validation_accuracy"] > 0.9 and "validation_chosen_logp" in judged
    assert judged["validation_desirable_reward"] > judged["validation_undesirable_reward"]
    assert "nats an answer" in (tmp_path / "run" / "report.html").read_text()


def test_the_config_of_the_repository_is_planned() -> None:
    """The program takes the model, its reference and what belongs to each pair, split over a mesh."""
    cfg = toml.load(Path(__file__).parents[2] / "configs" / "preference" / "dpo.toml", ["model.vocab_size=262"])
    layout = Layout.from_config(config.Mesh(data=2, fsdp=2, tensor=2))
    state, frozen, batch = abstract_inputs(cfg, layout, training_program(cfg, layout, make_recipe(cfg)))
    assert frozen.keys() == {"reference"}
    assert jax.tree.map(lambda x: x.shape, frozen["reference"]) == jax.tree.map(lambda x: x.shape, state.params)
    assert batch["labels"].shape == batch["margins"].shape == (4, 8) and batch["tokens"].shape == (4, 1024)


def test_a_cached_reference_is_not_planned() -> None:
    """Its tree is not there, and the batch has a number for each answer."""
    path = Path(__file__).parents[2] / "configs" / "preference" / "dpo.toml"
    sizes = ["model.vocab_size=262", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    frozen, cached = (toml.load(path, [*sizes, f"preference.cached_reference={on}"]) for on in ("false", "true"))
    layout = Layout.from_config(cached.mesh)
    _, trees, batch = abstract_inputs(cached, layout, training_program(cached, layout, make_recipe(cached)))
    assert trees == {} and batch["reference_logps"].shape == (4, 16)
    assert estimate(cached, 8).parameters == estimate(frozen, 8).parameters // 2


def test_mistakes_of_the_config(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="compares with the model that the run starts from, and there is none"):
        make_recipe(dpo_run(begun, tmp_path, train={"init_from": ""}))
    assert not make_recipe(dpo_run(begun, tmp_path, loss="simpo", train={"init_from": ""})).models.frozen
    with pytest.raises(UserError, match="beta"):
        dpo_run(begun, tmp_path, preference={"beta": 0.0})
    with pytest.raises(UserError, match=r"label_noise = 0.5 must be below 0.5"):
        dpo_run(begun, tmp_path, loss="cdpo", preference={"label_noise": 0.5})
    with pytest.raises(UserError, match="cached_reference: simpo compares with no reference"):
        dpo_run(begun, tmp_path, loss="simpo", preference={"cached_reference": True})
    cached = dpo_run(begun, tmp_path, preference={"cached_reference": True})
    experts = config.MoE(n_experts=4, capacity_factor=1.0)
    model = dataclasses.replace(cached.model, pattern=("attention+moe",), moe=experts)
    with pytest.raises(UserError, match=r"cached_reference: with moe\.capacity_factor"):
        make_recipe(dataclasses.replace(cached, model=model))
    with pytest.raises(UserError, match="kto has no chosen answer"):
        dpo_run(begun, tmp_path, loss="kto", preference={"sft_weight": 0.5})


def test_mistakes_of_labels(begun: Path, tmp_path: Path) -> None:
    wanted = [{"prompt": word, "completion": "yes", "label": True} for word in WORDS]
    source = {"data": {"source": write(tmp_path / "labels.jsonl", wanted), "validation_fraction": 0.0}}
    cfg = dpo_run(begun, tmp_path, loss="kto")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **source["data"]))
    with pytest.raises(UserError, match="KTO needs answers that are wanted and answers that are not"):
        make_recipe(cfg).data(None)
    cfg = dataclasses.replace(cfg, preference=dataclasses.replace(cfg.preference, loss="dpo"))
    with pytest.raises(UserError, match="an answer with a label is no pair"):
        make_recipe(cfg).data(None)


def test_references_that_do_not_fit(begun: Path, tmp_path: Path) -> None:
    other: Any = {"preference": {"reference": str(begun / "start")}, "train": {"init_from": "", "steps": 1}}
    nowhere: Any = {"data": {"source": "never read"}, "preference": {"reference": str(tmp_path / "nowhere")}}
    with pytest.raises(UserError, match=r"the frozen reference: .*nowhere: no such folder"):
        start.run(dpo_run(begun, tmp_path, **nowhere))
    unread: Any = {"data": {"source": "never read"}, "model": {"d_model": 48}}
    with pytest.raises(
        UserError, match=r"frozen reference: preference\.reference = .*: d_model is 32 there and 48 here"
    ):
        start.run(dpo_run(begun, tmp_path, **unread, **other))
    with pytest.raises(UserError, match=r"the start of model: train\.init_from = .*: d_model is 32 there and 48 here"):
        start.run(dpo_run(begun, tmp_path, **unread, preference={"loss": "orpo"}))
    shutil.copytree(begun / "start", tmp_path / "other")
    words = tmp_path / "other" / "tokenizer.json"
    words.write_text(words.read_text().replace('"!"', '"x?"').replace('"?"', '"!"').replace('"x?"', '"?"'))
    with pytest.raises(UserError, match=r"other: its tokenizer is another than that of \[tokenizer\]"):
        start.run(dpo_run(begun, tmp_path, preference={"reference": str(tmp_path / "other")}))
    start.run(dpo_run(begun, tmp_path, train={"steps": 1}, data=UNJUDGED))
    changed = {"reference": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"the frozen reference, .*run, is not the one of the checkpoint"):
        start.run(dpo_run(begun, tmp_path, preference=changed, data=UNJUDGED), resume=True)
