"""Fine-tuning from one TOML in both engines: curves and parameters, what is frozen, files, mistakes in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.families import FAMILIES
from jaxlm.convert.files.storage import planned, write_folder
from jaxlm.convert.open_model import open_model
from jaxlm.convert.rows import to_layout
from jaxlm.convert.training_state import convert_state
from jaxlm.errors import UserError
from jaxlm.models.decoder import Decoder, init_params
from jaxlm.numerics import Policy
from jaxlm.parity.stage import compare_stage
from jaxlm.recipes import make_recipe, start
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine  # two threads that import at once break Python's ast
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from tests.devices import on_devices

IMPORTED = engine

TOML = """
recipe = "sft"
[data]
source = "{folder}/turns.jsonl"
cache_dir = "{folder}/cache"
seq_len = 64
validation_fraction = 0.2
[train]
init_from = "{folder}/base"
steps = 20
batch_size = 4
learning_rate = 1e-2
warmup_steps = 2
[eval]
every = 10
batches = 2
[sample]
prompts = []
[log]
every = 1
[numerics]
params = "float64"
compute = "float64"
matmul = "highest"
[torch]
device = "cpu"
"""
KINDS = {
    "full": [],
    "lora": ["lora.rank=3", "train.microbatches=2"],
    "dora": ["lora.rank=3", "lora.dora=true", "lora.rslora=true"],
    "qlora": ["lora.rank=3", 'lora.quantize="nf4"'],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base with a byte tokenizer, and forty conversations."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = Tokenizer.bytes_level()
    model = config.Model(
        vocab_size=tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, max_seq_len=128
    )
    with jax.enable_x64(True):
        wide = jax.numpy.dtype("float64")
        params = init_params(Decoder(model, Policy(wide, wide)), jax.random.key(0))
    family = FAMILIES["llama"]
    tensors = [(name, np.ascontiguousarray(x)) for name, x in to_layout(params, model, family.rows(model))]
    files = {
        "config.json": json.dumps(family.config_to_hf(model, dtype="float64")),
        "tokenizer.json": tokenizer.to_json(),
    }
    write_folder(folder / "base", planned(tensors), files, layout="llama")
    with (folder / "turns.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"prompt": f"{i} + {i}?", "completion": "so it is " * (i % 4) + str(2 * i)}) + "\n")
    (folder / "sft.toml").write_text(TOML.format(folder=folder))
    return folder


def settings(folder: Path, name: str, *overrides: str) -> config.Config:
    return toml.load(folder / "sft.toml", [f'out_dir="{folder / name}"', *overrides])


def train(folder: Path, name: str, *overrides: str, backend: Any = "jax", **options: Any) -> dict[str, np.ndarray]:
    """All figures of all steps of a run."""
    with on_devices(1):
        start.run(settings(folder, name, *overrides), backend=backend, **options)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    figures = {key: np.array([row[key] for row in steps]) for key in ("loss", "nll", "accuracy", "weight", "grad_norm")}
    held_out = [row for row in rows if "validation_loss" in row]
    return figures | {"validation": np.array([row["validation_loss"] for row in held_out])}


def same_parameters(a: Path, b: Path) -> None:
    ours, theirs = open_model(a).parameters, open_model(b).parameters
    assert ours.keys() == theirs.keys()
    for name in ours:
        FLOAT64.check(pairs.error(np.asarray(theirs[name]), np.asarray(ours[name])), name)


@pytest.mark.parametrize(
    "kind", ["lora", *(pytest.param(k, marks=pytest.mark.soak) for k in ("full", "dora", "qlora"))]
)
def test_twenty_updates_of_both_engines(kind: str, folder: Path) -> None:
    ours = train(folder, kind, *KINDS[kind])
    theirs = train(folder, f"{kind}-torch", *KINDS[kind], backend="torch")
    assert len(ours["loss"]) == 20 and ours["loss"][-1] < ours["loss"][0] - 0.5
    for name, curve in ours.items():
        FLOAT64.check(pairs.error(theirs[name], curve), name)
    same_parameters(folder / kind, folder / f"{kind}-torch")
    if kind == "lora":
        files_of_a_run(folder)


def files_of_a_run(folder: Path) -> None:
    """The base is where and what it was; the checkpoint holds adapters alone; the run is used like any other."""
    run, base = folder / "lora", folder / "base"
    stated = json.loads((run / "frozen.json").read_text())
    assert stated["base"]["path"] == str(base)
    stored = sum(file.stat().st_size for file in (run / "checkpoints" / "20").rglob("*") if file.is_file())
    assert stored < base.joinpath("model.safetensors").stat().st_size

    model = jaxlm.load(run)
    assert model.generate("<|user|>3 + 3?<|end|><|assistant|>", max_new_tokens=4).text
    before, after = (np.asarray(open_model(x).parameters["layers.0.mixer.q_proj.kernel"]) for x in (base, run))
    assert pairs.error(before, after) > 1e-3, "the adapters move the whole model"
    assert np.array_equal(np.asarray(open_model(run).parameters["embed.embedding"]), embedding_of(base))
    jaxlm.convert(run, folder / "hf", "hf")
    tokens = np.arange(40, dtype=np.int32)[None]
    assert np.array_equal(jaxlm.load(folder / "hf")(tokens), model(tokens))
    jaxlm.convert(run, folder / "again", "jaxlm")
    assert np.array_equal(jaxlm.load(folder / "again")(tokens), model(tokens))
    with pytest.raises(UserError, match="a run with adapters resumes in its own framework"):
        convert_state(run, folder / "none", "torch", lambda cfg: make_recipe(cfg).models)
    with pytest.raises(UserError, match="not a run with adapters"):
        jaxlm.convert(folder / "again", folder / "none", "peft")

    jaxlm.convert(run, folder / "peft", "peft")
    assert pairs.error(np.asarray(jaxlm.load(folder / "peft")(tokens)), np.asarray(model(tokens))) < 1e-12
    findings = list(compare_stage(open_model(run).config, open_model(run).read().params))
    assert any("q_proj.adapter.b" in finding.name for finding in findings)
    assert all(finding.error <= finding.bound for finding in findings)

    (run / "frozen.json").write_text(json.dumps({"base": {**stated["base"], "sha256": "0" * 64}}))
    with pytest.raises(UserError, match="its base is another model than the adapters were trained on"):
        open_model(run)
    with pytest.raises(UserError, match="its base is another model than the adapters were trained on"):
        jaxlm.convert(run, folder / "none", "peft")
    (run / "frozen.json").write_text(json.dumps(stated))
    base.rename(folder / "moved")
    with pytest.raises(UserError, match=r"lora: its base cannot be opened: .* no such folder .*frozen\.json"):
        open_model(run)
    (folder / "moved").rename(base)


def embedding_of(path: Path) -> np.ndarray:
    return np.asarray(open_model(path).parameters["embed.embedding"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_reads_the_adapters_of_a_run(folder: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import torch
    import transformers

    if not (folder / "peft").exists():
        train(folder, "few", *KINDS["lora"], "train.steps=2")
        jaxlm.convert(folder / "few", folder / "peft", "peft")
    with torch.no_grad():
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
        theirs = peft.PeftModel.from_pretrained(base, folder / "peft").eval()(torch.arange(40)[None]).logits.numpy()
    ours = jaxlm.load(folder / "lora" if (folder / "lora").exists() else folder / "few")(np.arange(40)[None])
    assert pairs.error(theirs, np.asarray(ours)) < 1e-4  # transformers rotates in float32


@pytest.mark.soak
def test_microbatches_and_packing_change_nothing(folder: Path) -> None:
    few = ("lora.rank=3", "train.steps=5", "train.batch_size=8")
    whole = train(folder, "m1", *few, "sft.pack=false")
    for count in (2, 4):
        parts = train(folder, f"m{count}", *few, "sft.pack=false", f"train.microbatches={count}")
        assert pairs.error(parts["loss"], whole["loss"]) < 1e-12


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_run_that_resumes_ends_as_if_it_had_not_stopped(backend: str, folder: Path) -> None:
    few = ("lora.rank=3", "train.microbatches=2", "train.steps=6", "checkpoint.every=4", "eval.every=0")
    whole = train(folder, f"through-{backend}", *few, backend=backend)
    shutil.copytree(folder / f"through-{backend}", folder / f"stopped-{backend}")
    shutil.rmtree(folder / f"stopped-{backend}" / "checkpoints" / "6")
    again = train(folder, f"stopped-{backend}", *few, backend=backend, resume=True)
    assert np.array_equal(again["loss"][-2:], whole["loss"][-2:])
    ours, theirs = (open_model(folder / f"{name}-{backend}").parameters for name in ("through", "stopped"))
    assert all(np.array_equal(np.asarray(ours[name]), np.asarray(theirs[name])) for name in ours)


def test_modules_that_are_trained_whole(folder: Path) -> None:
    """Embedding and norm beside adapters: both engines move them alike, and the run opens, exports and goes on."""
    few = ("lora.rank=3", 'lora.modules_to_save=["embed","final_norm"]', "eval.every=0")
    ours = train(folder, "saved", *few, "train.steps=2")
    theirs = train(folder, "saved-torch", *few, "train.steps=2", backend="torch")
    FLOAT64.check(pairs.error(theirs["loss"], ours["loss"]), "loss")
    same_parameters(folder / "saved", folder / "saved-torch")
    for name in ("embed.embedding", "final_norm.scale"):
        before, after = (np.asarray(open_model(folder / x).parameters[name]) for x in ("base", "saved"))
        assert pairs.error(before, after) > 1e-4
    tokens = np.arange(40, dtype=np.int32)[None]
    jaxlm.convert(folder / "saved", folder / "saved-peft", "peft")
    stated = json.loads((folder / "saved-peft" / "adapter_config.json").read_text())
    assert stated["modules_to_save"] == ["model.embed_tokens", "model.norm"]
    model = jaxlm.load(folder / "saved")
    assert pairs.error(np.asarray(jaxlm.load(folder / "saved-peft")(tokens)), np.asarray(model(tokens))) < 1e-12
    again = train(folder, "saved-torch", *few, "train.steps=3", backend="torch", resume=True)
    assert len(again["loss"]) == 3 and again["loss"][2] < again["loss"][0]
    with pytest.raises(UserError, match=r"lora\.modules_to_save: 'hed' is no module outside the layers"):
        train(folder, "mistake", "lora.rank=3", 'lora.modules_to_save=["hed"]')


def test_another_base_does_not_resume(folder: Path, tmp_path: Path) -> None:
    few = ("lora.rank=3", "train.microbatches=2", "train.steps=2", "eval.every=0")
    train(folder, "moved", *few)
    model = jaxlm.load(folder / "base", dtype="float64")
    params = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    dataclasses.replace(model, params=params).save(tmp_path / "other", "llama")
    with pytest.raises(UserError, match=r"the frozen base, .*other, is not the one of the checkpoint"):
        own = ('tokenizer.kind="file"', f'tokenizer.path="{folder / "base" / "tokenizer.json"}"')
        other = f'train.init_from="{tmp_path / "other"}"'
        train(folder, "moved", *few, *own, "train.steps=4", other, resume=True)


def test_mistakes_are_one_line(folder: Path) -> None:
    for overrides, message in (
        (["lora.rank=3", 'train.init_from=""'], "lora.rank = 3: adapters need a base"),
        (["lora.rank=3", 'lora.targets=["mixr.*"]'], r"lora.targets: 'mixr.\*' matches no linear map"),
        (["lora.rank=900"], "lora.rank = 900: .* has ranks from 1 to 64"),
        (["lora.rank=3", "lora.rank_pattern={q_proj=900}"], "lora.rank = 900: .*q_proj has ranks from 1 to 64"),
        (['lora.quantize="nf4"'], "lora.quantize = 'nf4' needs adapters"),
        (["lora.rank=3", 'recipe="tests.toy_stage:recipe"'], "the recipe 'tests.toy_stage:recipe' trains no adapters"),
        (['recipe="stf"'], "recipe = 'stf': no such recipe"),
        (['sft.template="alpacca"'], "no such template"),
        (["data.seq_len=8"], "no example is left to train on"),
    ):
        with pytest.raises(UserError, match=message):
            train(folder, "mistake", *overrides)
