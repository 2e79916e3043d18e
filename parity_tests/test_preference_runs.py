"""Learning from pairs in both frameworks, float64: the objective, its updates, and whole runs on packed pairs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.open_model import open_model
from jaxlm.data.preferences.pairs import encode_pairs, sides_of, sort_preferences
from jaxlm.data.preferences.rows import PairRows
from jaxlm.data.turns.records import Record
from jaxlm.models.decoder import Decoder
from jaxlm.numerics import Policy
from jaxlm.parity.inputs import random_params
from jaxlm.parity.stage import compare_stage
from jaxlm.recipes import dpo, sft, start  # two threads that import at once break Python's ast
from jaxlm.run.metrics import read_metrics
from jaxlm.text.chat import Chat
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from torch_ref.recipes import dpo as torch_dpo

IMPORTED = dpo, sft, engine
SOAK = pytest.mark.soak
MODEL = {"vocab_size": 262, "d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}
STAGES = [
    pytest.param({"loss": "dpo", "sft_weight": 0.2}, {}, id="dpo"),
    pytest.param({"loss": "orpo"}, {}, id="orpo"),
    pytest.param({"loss": "kto", "desirable_weight": 1.3}, {}, id="kto"),
    pytest.param({"loss": "dpo", "cached_reference": True}, {}, id="dpo, cached reference"),
    pytest.param({"loss": "kto"}, {"lora": {"rank": 2}, "train": {"microbatches": 2}}, id="kto, adapters"),
    pytest.param({"loss": "dpo"}, {"lora": {"rank": 2, "dora": True}}, id="dpo, adapters", marks=SOAK),
    pytest.param({"loss": "robust"}, {}, id="robust", marks=SOAK),
    pytest.param({"loss": "ipo"}, {}, id="ipo", marks=SOAK),
    pytest.param({"loss": "simpo", "beta": 2.0}, {}, id="simpo", marks=SOAK),
    pytest.param(
        {"loss": "dpo"},
        {"pattern": ("attention+moe",), "moe": {"n_experts": 4, "balance_loss": 0.1}},
        id="experts",
        marks=SOAK,
    ),
    pytest.param({"loss": "dpo"}, {"pattern": ("mamba+mlp", "attention+mlp")}, id="mamba", marks=SOAK),
]


def stage(preference: dict[str, Any], model: dict[str, Any]) -> config.Config:
    """`model` may have `lora` and `train` beside options of the model."""
    model = dict(model)
    train = {"init_from": "unread", "warmup_steps": 1, **model.pop("train", {})}
    sections = {"train": train, "preference": preference, "lora": model.pop("lora", {})}
    return toml.from_dict({"recipe": "dpo", "model": MODEL | model, **sections})


@pytest.mark.parametrize(("preference", "model"), STAGES)
def test_both_frameworks_train_the_stage_alike(preference: dict[str, Any], model: dict[str, Any]) -> None:
    """Sums of the objective, and every parameter after 1 and 20 updates."""
    cfg = stage(preference, model)
    findings = list(compare_stage(cfg, random_params(cfg.model)))
    assert {finding.level for finding in findings} == {"stage loss", "stage update 1", "stage update 20"}
    assert [finding for finding in findings if not finding.ok] == []


@pytest.mark.parametrize("fault", ["another reference", "lengths count the prompt"])
def test_faults_of_the_twin_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_dpo.answer_sums

    def wrong(decoder: Any, batch: Any, cfg: Any) -> Any:
        logps, counts = original(decoder, batch, cfg)
        if fault == "lengths count the prompt":
            return logps, counts + 1
        return (logps * 0.999 if not decoder.embed.weight.requires_grad else logps), counts

    monkeypatch.setattr(torch_dpo, "answer_sums", wrong)
    cfg = stage({"loss": "ipo"}, {})
    levels = {finding.level for finding in compare_stage(cfg, random_params(cfg.model)) if not finding.ok}
    assert "stage loss" in levels and "stage update 1" in levels


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_of(folder: Path, name: str, recipe: str, data: str, **sections: Any) -> config.Config:
    options: dict[str, Any] = {
        "model": MODEL | {"vocab_size": Tokenizer.bytes_level().vocab_size},
        "tokenizer": {"kind": "bytes"},
        "data": {"source": data, "seq_len": 96, "validation_fraction": 0.2},
        "train": {"steps": 20, "batch_size": 2, "warmup_steps": 0, "learning_rate": 3e-3},
        "eval": {"every": 0},
        "sample": {"prompts": ()},
        "log": {"every": 1},
        "numerics": {"params": "float64", "compute": "float64", "matmul": "highest"},
        "seed": 3,
    }
    merged = {
        key: value | sections.pop(key, {}) if isinstance(value, dict) else value for key, value in options.items()
    }
    return toml.from_dict({"recipe": recipe, "out_dir": str(folder / name), **merged, **sections})


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_whole_runs_are_the_same(tmp_path: Path, loss: str) -> None:
    """From one start, on packed pairs that each engine reads by itself: metrics of 20 updates, then all parameters."""
    words = ["".join(np.random.default_rng(i).choice(list("abcdefg"), 1 + i % 6)) for i in range(40)]
    rows = [{"prompt": f"say {i}", "chosen": a, "rejected": f"no {a}"} for i, a in enumerate(words)]
    talks = write(tmp_path / "talks.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
    start.run(run_of(tmp_path, "start", "sft", talks, train={"steps": 1}))
    source, found = write(tmp_path / "pairs.jsonl", rows), {}
    for backend in ("jax", "torch"):
        preference = {"loss": loss, "pairs_per_row": 3}
        train = {"init_from": str(tmp_path / "start"), "microbatches": 2}
        start.run(run_of(tmp_path, backend, "dpo", source, train=train, preference=preference), backend=backend)
        found[backend] = [row for row in read_metrics(tmp_path / backend / "metrics.jsonl") if "loss" in row]
    assert len(found["jax"]) == 20
    named = [name for name in found["torch"][0] if name.startswith(("chosen", "rejected", "desirable", "undesirable"))]
    for name in ("loss", "grad_norm", "accuracy", *named):
        ours, theirs = (np.array([row[name] for row in found[backend]]) for backend in ("jax", "torch"))
        FLOAT64.check(pairs.error(theirs, ours), name)
    ours, theirs = (open_model(str(tmp_path / backend)).parameters for backend in ("jax", "torch"))
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        FLOAT64.check(pairs.error(np.asarray(theirs[name]), np.asarray(ours[name])), name)


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_a_pair_does_not_see_its_neighbours(kind: str, rng: np.random.Generator) -> None:
    """Trap 8: other tokens in the rest of the row leave the sums of the first pair as they are, bit for bit."""
    cfg = stage({"loss": kind}, {"vocab_size": Tokenizer.bytes_level().vocab_size, "max_seq_len": 64})
    cfg = dataclasses.replace(cfg, numerics=config.Numerics(params="float64", compute="float64", matmul="highest"))
    decoder = Decoder(cfg.model, Policy.from_config(cfg.numerics))
    widened = lambda leaf: jax.numpy.asarray(np.asarray(leaf, "float64"))  # noqa: E731
    params = jax.tree.map(widened, pairs.random_params(cfg.model, rng))
    chat = Chat.of(Tokenizer.bytes_level())
    read = sort_preferences(Record("x", {"prompt": "say", "chosen": f"a{i}", "rejected": "b"}) for i in range(9))
    rows = PairRows(encode_pairs(sides_of(read.pairs), chat, 96), 96, pad=chat.tokenizer.pad, most=3)
    batch = rows[np.arange(2)]
    others = {**batch, "tokens": np.where(batch["segments"] > 2, 70, batch["tokens"]).astype(np.int32)}
    sums = jax.jit(lambda batch: dpo.answer_sums(decoder, params, batch, None, cfg)[0])
    a, b = np.asarray(sums(batch)), np.asarray(sums(others))
    assert np.array_equal(a[:, :2], b[:, :2]) and not np.array_equal(a, b)
