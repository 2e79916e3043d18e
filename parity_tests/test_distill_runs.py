"""Distillation in both frameworks, float64: the objective, its updates, whole runs, teachers that do not fit."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxlm import cli, config
from jaxlm.config import toml
from jaxlm.convert.open_model import open_model
from jaxlm.errors import UserError
from jaxlm.infer.model import Model
from jaxlm.models.decoder import unrolled, unstack_layers
from jaxlm.parity.inputs import random_params
from jaxlm.parity.stage import compare_stage
from jaxlm.recipes import distill, make_recipe, sft, start, teach  # two threads that import at once break Python's ast
from jaxlm.recipes.forward import forward_with_layers
from jaxlm.run.metrics import read_metrics
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from tests.devices import on_devices
from torch_ref.recipes import distill as torch_distill

IMPORTED = distill, sft, engine
SOAK = pytest.mark.soak
BYTES = Tokenizer.bytes_level()
STUDENT: dict[str, Any] = {
    "vocab_size": BYTES.vocab_size,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "d_ff": 24,
}
TEACHER = STUDENT | {"d_model": 24, "n_layers": 2, "d_ff": 32, "tie_embeddings": False, "init_std": 0.2}


def save(path: Path, tokenizer: Tokenizer | None = BYTES, **model: Any) -> None:
    """A random model, by default that of the teacher."""
    cfg = toml.from_dict({"model": TEACHER | {"max_seq_len": 64} | model, "data": {"seq_len": 32}})
    params = jax.tree.map(lambda x: np.asarray(x, "float32"), pairs.random_params(cfg.model, np.random.default_rng(5)))
    Model(cfg, params, tokenizer).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher and a random student, and forty conversations."""
    folder = tmp_path_factory.mktemp("distill")
    save(folder / "teacher")
    save(folder / "student", **STUDENT, tie_embeddings=True)
    lines = [f'{{"prompt": "say {i}", "completion": "{"abc"[i % 3] * (1 + i % 5)}"}}' for i in range(40)]
    (folder / "talks.jsonl").write_text("\n".join(lines))
    return folder


def settings(folder: Path, name: str = "run", **sections: Any) -> config.Config:
    tree: dict[str, Any] = {
        "model": STUDENT | {"max_seq_len": 64},
        "data": {"source": str(folder / "talks.jsonl"), "seq_len": 64, "validation_fraction": 0.2},
        "distill": {"teacher": str(folder / "teacher"), "temperature": 1.5, "hard_weight": 0.3},
        "train": {"steps": 20, "batch_size": 2, "warmup_steps": 1, "learning_rate": 1e-2, "schedule": "constant"},
        "eval": {"every": 0, "batches": 2},
        "sample": {"prompts": ()},
        "log": {"every": 1},
        "numerics": {"params": "float64", "compute": "float64", "matmul": "highest"},
    }
    merged = {key: {**value, **sections.pop(key, {})} for key, value in tree.items()}
    return toml.from_dict({"recipe": "distill", "out_dir": str(folder / name), **merged, **sections})


HIDDEN: dict[str, Any] = {"divergence": "hidden", "temperature": 1.0, "layers": [[0, 1], [-1, -2]]}
"""Crossed, so that a twin that takes the layers in order is seen."""
TWO: dict[str, Any] = {"n_layers": 2}

STAGES = [
    pytest.param({"divergence": "jsd", "beta": 0.3}, {}, id="jsd"),
    pytest.param({"divergence": "reverse"}, {"lora": {"rank": 2}}, id="reverse, adapters"),
    pytest.param(
        {},
        {"model": {"pattern": ("attention+moe",), "moe": {"n_experts": 4, "balance_loss": 0.1}}},
        id="experts",
        marks=SOAK,
    ),
    pytest.param({}, {"model": {"vocab_size": BYTES.vocab_size + 3}}, id="filled vocabulary", marks=SOAK),
    pytest.param({"cache": "unread", "cache_size": 5, "divergence": "jsd"}, {}, id="cached"),
    pytest.param(HIDDEN, {"model": TWO}, id="hidden states"),
    pytest.param(
        HIDDEN | {"teacher": "stacked"},
        {"model": TWO | {"layer_loop": "scan"}, "lora": {"rank": 2}},
        id="hidden states, adapters of stacked layers",
        marks=SOAK,
    ),
    pytest.param(
        HIDDEN,
        {"model": TWO | {"pattern": ("attention+moe",), "moe": {"n_experts": 4, "balance_loss": 0.1}}},
        id="hidden states, experts",
        marks=SOAK,
    ),
]


@pytest.mark.parametrize(("options", "sections"), STAGES)
def test_both_frameworks_train_the_stage_alike(options: dict[str, Any], sections: Any, folder: Path) -> None:
    """Sums of the objective, and every parameter after 1 and 20 updates."""
    if options.get("teacher"):
        save(folder / options["teacher"], layer_loop="scan")
        options = options | {"teacher": str(folder / options["teacher"])}
    cfg = settings(folder, distill=options, **{"train": {"init_from": "unread"}, **sections})
    findings = list(compare_stage(cfg, random_params(cfg.model)))
    assert {finding.level for finding in findings} == {"stage loss", "stage update 1", "stage update 20"}
    assert {"divergence", "accuracy", "nll"} <= {finding.name for finding in findings}
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize(
    "fault", ["the student teaches itself", pytest.param("the teacher sees no documents", marks=SOAK)]
)
def test_faults_of_the_twin_are_seen(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_distill.objective

    def wrong(modules: Any, cfg: Any) -> Any:
        if fault == "the student teaches itself":
            return original({**modules, "teacher": modules["model"]}, cfg)
        hidden, teacher = modules["teacher"].hidden, modules["teacher"]
        monkeypatch.setattr(teacher, "hidden", lambda tokens, at, rows: hidden(tokens, at, rows.clamp(max=1)))
        return original(modules, cfg)

    monkeypatch.setattr(torch_distill, "objective", wrong)
    cfg = settings(folder)
    levels = {finding.level for finding in compare_stage(cfg, random_params(cfg.model)) if not finding.ok}
    assert {"stage loss", "stage update 1"} <= levels


@pytest.mark.parametrize("fault", ["the projection has no gradient", pytest.param("layers in order", marks=SOAK)])
def test_faults_of_hidden_states_are_seen(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_distill.states_loss

    def wrong(*args: Any, **options: Any) -> Any:
        hidden, kernel, bias, states, targets, weights = args
        if fault == "layers in order":
            found = [one._replace(teacher_BTE=two.teacher_BTE) for one, two in zip(states, states[::-1], strict=True)]
        else:
            found = [one._replace(projection_DE=one.projection_DE.detach()) for one in states]
        return original(hidden, kernel, bias, found, targets, weights, **options)

    monkeypatch.setattr(torch_distill, "states_loss", wrong)
    cfg = settings(folder, distill=HIDDEN, model=TWO)
    wrongs = [finding for finding in compare_stage(cfg, random_params(cfg.model)) if not finding.ok]
    assert ("stage loss" in {finding.level for finding in wrongs}) == (fault == "layers in order")
    of_maps = {finding.name for finding in wrongs if finding.level == "stage update 1"}
    assert {"projection: 0_to_1.weight", "projection: 1_to_0.weight"} <= of_maps


def run(cfg: config.Config, devices: int = 1, **options: Any) -> list[dict[str, Any]]:
    with on_devices(devices):
        start.run(cfg, **options)
    return [row for row in read_metrics(Path(cfg.out_dir) / "metrics.jsonl") if "loss" in row or "eval_loss" in row]


@pytest.mark.usefixtures("pages")
def test_whole_runs_are_the_same_and_go_on(folder: Path) -> None:
    """Metrics of 20 updates of both engines, all parameters, and the same bits after a stop."""
    begun = {"train": {"init_from": str(folder / "student")}}
    rows = {name: run(settings(folder, name, **begun), backend=name) for name in ("jax", "torch")}
    assert len(rows["jax"]) == 20 and rows["jax"][-1]["divergence"] < rows["jax"][0]["divergence"]
    for name in ("loss", "nll", "divergence", "accuracy", "grad_norm"):
        ours, theirs = (np.array([row[name] for row in rows[backend]]) for backend in ("jax", "torch"))
        FLOAT64.check(pairs.error(theirs, ours), name)
    ours, theirs = (open_model(str(folder / backend)).parameters for backend in ("jax", "torch"))
    for name in ours:
        FLOAT64.check(pairs.error(np.asarray(theirs[name]), np.asarray(ours[name])), name)
    last = [row for row in read_metrics(folder / "jax" / "metrics.jsonl") if "validation_loss" in row][-1]
    assert {"validation_divergence", "validation_accuracy"} <= last.keys()

    run(settings(folder, "stopped", train=begun["train"] | {"steps": 10}))
    again = run(settings(folder, "stopped", **begun), resume=True)
    assert [row["loss"] for row in again[-10:]] == [row["loss"] for row in rows["jax"][-10:]]
    found = open_model(str(folder / "stopped")).parameters
    assert all(np.array_equal(np.asarray(found[name]), np.asarray(ours[name])) for name in ours)

    save(folder / "other", d_ff=40)
    changed = settings(
        folder, "stopped", train=begun["train"] | {"steps": 22}, distill={"teacher": str(folder / "other")}
    )
    with pytest.raises(UserError, match=r"the frozen teacher, .*other, is not the one of the checkpoint"):
        run(changed, resume=True)


@pytest.mark.usefixtures("pages")
def test_runs_by_hidden_states_are_the_same_and_go_on(folder: Path) -> None:
    """As above; and what is trained beside the student is drawn alike, saved, resumed, and left out of the model."""

    def cfg(name: str, steps: int) -> config.Config:
        return settings(folder, f"hidden-{name}", distill=HIDDEN, model=TWO, train={"steps": steps, "init_from": begun})

    begun = str(folder / "two")
    save(folder / "two", **STUDENT | TWO, tie_embeddings=True)
    rows, ours = {}, {}
    for name in ("jax", "torch"):
        rows[name] = run(cfg(name, 20), backend=name)
        ours[name] = open_model(str(folder / f"hidden-{name}")).parameters
    assert len(rows["jax"]) == 20 and rows["jax"][-1]["divergence"] < rows["jax"][0]["divergence"]
    for name in ("loss", "nll", "divergence", "grad_norm", "projection_grad_norm"):
        mine, other = (np.array([row[name] for row in rows[backend]]) for backend in ("jax", "torch"))
        FLOAT64.check(pairs.error(other, mine), name)
    assert ours["jax"].keys() == ours["torch"].keys() == open_model(begun).parameters.keys()
    page = (folder / "hidden-jax" / "report.html").read_text()
    assert re.search(r"<td>loss</td><td>[\d.]+</td>", page), "a sum of nats and square distances has no unit"
    assert re.search(r"<td>validation divergence</td><td>[\d.]+ from the teacher</td>", page)
    for name in ours["jax"]:
        FLOAT64.check(pairs.error(np.asarray(ours["torch"][name]), np.asarray(ours["jax"][name])), name)
    for name in ("jax", "torch"):
        run(cfg(f"stopped-{name}", 10), backend=name)
        again = run(cfg(f"stopped-{name}", 20), resume=True, backend=name)
        assert [row["loss"] for row in again[-10:]] == [row["loss"] for row in rows[name][-10:]]
        found = open_model(str(folder / f"hidden-stopped-{name}")).parameters
        assert all(np.array_equal(np.asarray(found[leaf]), np.asarray(ours[name][leaf])) for leaf in found)


def test_outputs_of_layers_are_those_of_any_form() -> None:
    """Stacked, recomputed or unrolled, in both frameworks."""
    model = toml.from_dict({"model": STUDENT | {"n_layers": 4, "pattern": ["attention+mlp", "attention"]}}).model
    stacked = dataclasses.replace(model, layer_loop="scan")
    both = pairs.pair(stacked, pairs.random_params(stacked, np.random.default_rng(3)))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    rows = {"tokens": tokens, "positions": tokens % 12, "segments": np.ones_like(tokens)}
    theirs: dict[int, Any] = dict.fromkeys((3, 0, 2))
    at, documents = torch.tensor(rows["positions"]), torch.tensor(rows["segments"])
    both.torch.hidden(torch.tensor(tokens), at, documents, outputs=theirs)
    assert theirs.keys() == {0, 2, 3}, "no other output is kept"
    recomputed = both.jax.clone(config=dataclasses.replace(stacked, remat="full"))
    for decoder in (both.jax, recomputed, unrolled(both.jax)):
        params = both.params if decoder.config.scanned else unstack_layers(both.params, stacked)
        ours = forward_with_layers(decoder, params, jax.tree.map(jax.numpy.asarray, rows), None, (3, 0, 2))[3]
        for layer, output in zip((3, 0, 2), ours, strict=True):
            FLOAT64.check(pairs.error(theirs[layer].detach().numpy(), np.asarray(output)), f"layer {layer}")


@pytest.mark.parametrize(
    ("mesh", "hidden"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, False),
        pytest.param({"data": 1, "fsdp": 8}, False, marks=SOAK),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, True, marks=SOAK),
        pytest.param({"data": 1, "fsdp": 8}, True, marks=SOAK),
    ],
    ids=str,
)
def test_eight_devices_are_one(mesh: dict[str, int], hidden: bool, folder: Path, tmp_path: Path) -> None:
    few: Any = {"train": {"steps": 2, "batch_size": 8}, **({"distill": HIDDEN, "model": TWO} if hidden else {})}
    names = ["loss", "grad_norm", "divergence"] + ["projection_grad_norm"] * hidden
    rows = []
    for devices, sizes in ((1, {}), (8, mesh)):
        cfg = dataclasses.replace(settings(folder, mesh=sizes, **few), out_dir=str(tmp_path / str(devices)))
        rows.append([[row[key] for key in names] for row in run(cfg, devices)])
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-10, atol=1e-12)


def test_a_corpus_and_the_tokenizer_of_the_teacher(folder: Path) -> None:
    (folder / "text.txt").write_text("a man saw a cat and a dog saw a man. " * 60)
    data = {"source": str(folder / "text.txt"), "cache_dir": str(folder / "cache"), "validation_fraction": 0.1}
    cfg = settings(folder, "corpus", distill={"rows": "corpus"}, model={"vocab_size": 0}, data=data)
    source = make_recipe(cfg).data(None)
    assert source.tokenizer.fingerprint() == BYTES.fingerprint()
    assert (next(source.batches(batch_size=2, rows=None))["weights"] == 1).any()


def test_teachers_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the recipe distill has no teacher"):
        make_recipe(settings(folder, distill={"teacher": ""}))
    with pytest.raises(UserError, match="no such folder"):
        make_recipe(settings(folder, distill={"teacher": "nowhere"}))
    save(tmp_path / "short", positions="learned", max_seq_len=32)
    with pytest.raises(UserError, match=r"has learned positions up to 32, data\.seq_len is 64"):
        make_recipe(settings(folder, distill={"teacher": str(tmp_path / "short")}))
    save(tmp_path / "score", head="reward")
    with pytest.raises(UserError, match=r"model\.head = 'reward': distill\.teacher = '.*score' needs a language model"):
        make_recipe(settings(folder, distill={"teacher": str(tmp_path / "score")}))
    save(tmp_path / "tongue", Tokenizer.bytes_level(specials=False))
    own = settings(folder, distill={"teacher": str(tmp_path / "tongue")}, tokenizer={"kind": "bytes"})
    with pytest.raises(UserError, match="tongue': its tokenizer is another than the student's"):
        make_recipe(own).data(None)
    shutil.copytree(folder / "teacher", tmp_path / "silent")
    (tmp_path / "silent" / "tokenizer.json").unlink()
    silent = settings(folder, distill={"teacher": str(tmp_path / "silent")}, tokenizer={"kind": "bytes"})
    assert make_recipe(silent).data(None)
    silent = dataclasses.replace(silent, model=dataclasses.replace(silent.model, vocab_size=300))
    with pytest.raises(UserError, match=f"its vocabulary has {BYTES.vocab_size} tokens, the student's 300"):
        make_recipe(silent).data(None)
    save(tmp_path / "few", None, vocab_size=100)
    few = settings(folder, distill={"teacher": str(tmp_path / "few")}, tokenizer={"kind": "bytes"})
    with pytest.raises(UserError, match=f"its vocabulary has 100 tokens, the tokenizer {BYTES.vocab_size} ids"):
        make_recipe(few).data(None)
    for options, message in (({"hard_weight": 1.0}, "leaves the teacher no weight"), ({"beta": 1.0}, "below 1")):
        with pytest.raises(UserError, match=message):
            settings(folder, distill=options)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["distill.layers=[[2,0]]"], "distill.layers: the student has no layer 2 (there are 0 to 1, or -1 to -2)"),
        (["distill.layers=[[0,-3]]"], "distill.layers: the teacher has no layer -3 (there are 0 to 1, or -1 to -2)"),
        (["distill.layers=[[0,0],[-2,0]]"], "distill.layers: [0, 0] is there twice"),
        (["distill.layers=[]"], "distill.layers has no pair"),
        (["distill.layers=[[0]]"], "distill.layers = [0]: "),
        (["distill.cache=thoughts"], "with distill.cache: a cache has no hidden states"),
        (["distill.temperature=2.0"], "hidden states have no logits to divide"),
        (["distill.divergence=reverse"], "without hidden states"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_layers_that_do_not_fit(
    overrides: list[str], line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 2, and nothing is written."""
    file = folder / "refused.toml"
    file.write_text(toml.to_toml(settings(folder, "refused", distill=HIDDEN, model=TWO)))
    monkeypatch.setattr(sys, "argv", ["jaxlm", "train", str(file), *overrides])
    assert cli.main() == 2
    error = capsys.readouterr().err.strip()
    assert line in error and "\n" not in error and not (folder / "refused").exists()


def test_a_cache_stands_for_its_teacher(folder: Path, tmp_path: Path) -> None:
    """All tokens kept: the losses of the teacher itself to 1e-12; few of them: both frameworks and a stop agree."""
    begun: dict[str, Any] = {"train": {"init_from": str(folder / "student"), "steps": 6}}
    whole = {"cache": str(tmp_path / "whole"), "cache_size": BYTES.vocab_size}
    few = {"cache": str(tmp_path / "few"), "cache_size": 7}
    for options in (whole, few):
        rows = teach.teach(settings(folder, distill=options, **begun))
        assert rows["train"] == 12 and rows["held_out-0"] > 0
    names = ("loss", "nll", "divergence", "grad_norm")

    def curve(name: str, distill: dict[str, Any], **options: Any) -> np.ndarray:
        rows = run(settings(tmp_path, name, distill=distill | {"teacher": str(folder / "teacher")}, **data), **options)
        return np.array([[row[key] for key in names] for row in rows])

    data: dict[str, Any] = {**begun, "data": {"source": str(folder / "talks.jsonl")}}
    memory, kept = curve("memory", {}), curve("kept", whole)
    np.testing.assert_allclose(kept, memory, rtol=1e-12, atol=1e-12)
    ours, theirs = curve("few", few), curve("torch", few, backend="torch")
    FLOAT64.check(pairs.error(theirs, ours), "metrics")
    assert np.all(ours[:, 2] < memory[:, 2]), "fewer outcomes are never further apart"
    data["train"] = begun["train"] | {"steps": 3}
    curve("stopped", few)
    data["train"] = begun["train"]
    assert np.array_equal(curve("stopped", few, resume=True)[-3:], ours[-3:])


def test_caches_of_something_else(folder: Path, tmp_path: Path) -> None:
    def source(**options: Any) -> Any:
        distill = {"cache": str(tmp_path / "cache"), "cache_size": 3} | options
        return make_recipe(settings(folder, distill=distill, train={"steps": 1})).data(None)

    with pytest.raises(UserError, match="reads no cache of a teacher"):
        teach.teach(settings(folder))
    with pytest.raises(UserError, match=r"distill\.cache_size = 900: the vocabulary has"):
        source(cache_size=900)
    teach.teach(settings(folder, distill={"cache": str(tmp_path / "cache"), "cache_size": 3}, train={"steps": 1}))
    assert source().identity()["teacher"].endswith(" 3")
    save(tmp_path / "other", d_ff=40)
    with pytest.raises(UserError, match="another teacher, by the sha256"):
        source(teacher=str(tmp_path / "other")).identity()


def test_vocabularies_are_compared_before_a_corpus_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "tongue", Tokenizer.bytes_level(specials=False))
    monkeypatch.setattr(distill.CorpusSource, "open", lambda *_: pytest.fail("the corpus is read"))
    options = {"teacher": str(tmp_path / "tongue"), "rows": "corpus"}
    with pytest.raises(UserError, match="its tokenizer is another than the student's"):
        make_recipe(settings(folder, distill=options, tokenizer={"kind": "bytes"})).data(None)
