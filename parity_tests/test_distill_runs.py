"""Distillation in both frameworks, float64: the objective, its updates, whole runs, teachers that do not fit."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.open_model import open_model
from jaxlm.errors import UserError
from jaxlm.infer.model import Model
from jaxlm.mesh import Layout
from jaxlm.parity.inputs import random_params
from jaxlm.parity.stage import compare_stage
from jaxlm.recipes import distill, make_recipe, sft, start, teach  # two threads that import at once break Python's ast
from jaxlm.run.metrics import read_metrics
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine
from jaxlm.train.program import abstract_inputs, training_program
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
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
]


@pytest.mark.parametrize(("options", "sections"), STAGES)
def test_both_frameworks_train_the_stage_alike(options: dict[str, Any], sections: Any, folder: Path) -> None:
    """Sums of the objective, and every parameter after 1 and 20 updates."""
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


def run(cfg: config.Config, devices: int = 1, **options: Any) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        some = jax.devices()[:devices]
        patch.setattr(jax, "devices", lambda *_: some)
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


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"data": 1, "fsdp": 8}, marks=SOAK)], ids=str
)
def test_eight_devices_are_one(mesh: dict[str, int], folder: Path, tmp_path: Path) -> None:
    few: Any = {"train": {"steps": 2, "batch_size": 8}}
    rows = []
    for devices, sizes in ((1, {}), (8, mesh)):
        cfg = dataclasses.replace(settings(folder, mesh=sizes, **few), out_dir=str(tmp_path / str(devices)))
        rows.append([[row[key] for key in ("loss", "grad_norm", "divergence")] for row in run(cfg, devices)])
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-10, atol=1e-12)


def test_a_corpus_and_the_tokenizer_of_the_teacher(folder: Path) -> None:
    (folder / "text.txt").write_text("a man saw a cat and a dog saw a man. " * 60)
    data = {"source": str(folder / "text.txt"), "cache_dir": str(folder / "cache"), "validation_fraction": 0.1}
    cfg = settings(folder, "corpus", distill={"rows": "corpus"}, model={"vocab_size": 0}, data=data)
    source = make_recipe(cfg).data(None)
    assert source.tokenizer.fingerprint() == BYTES.fingerprint()
    assert (next(source.batches(batch_size=2, rows=None))["weights"] == 1).any()


def test_the_config_of_the_repository_is_planned(folder: Path) -> None:
    """Its student and a teacher of another shape, split over a mesh."""
    file = Path(__file__).parents[1] / "configs" / "finetune" / "distill.toml"
    cfg = toml.load(file, [f'distill.teacher="{folder / "teacher"}"', f"model.vocab_size={BYTES.vocab_size}"])
    layout = Layout.from_config(config.Mesh(data=2, fsdp=2, tensor=2))
    state, frozen, _ = abstract_inputs(cfg, layout, training_program(cfg, layout, make_recipe(cfg)))
    assert frozen.keys() == {"teacher"}
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, frozen)]
    assert sizes[0] != sizes[1] > 0


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


def test_a_cache_stands_for_its_teacher(folder: Path, tmp_path: Path) -> None:
    """All tokens kept: the losses of the teacher itself to 1e-12; few of them: both frameworks and a stop agree."""
    begun = {"train": {"init_from": str(folder / "student"), "steps": 6}}
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
