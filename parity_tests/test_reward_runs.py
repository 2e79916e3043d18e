"""Whole runs of a reward model by the command, in both frameworks, float64: losses, accuracy and parameters."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxlm
from jaxlm import config
from jaxlm.config import toml
from jaxlm.convert.base import draw_head
from jaxlm.convert.files.safetensors_file import MappedFile
from jaxlm.convert.native import to_torch
from jaxlm.convert.open_model import open_adapters
from jaxlm.data.preferences.source import PreferenceSource
from jaxlm.errors import UserError
from jaxlm.infer.model import Model
from jaxlm.infer.scores import Scorer
from jaxlm.recipes import make_recipe, reward, start  # two threads that import at once break Python's ast
from jaxlm.recipes.rollouts.rewards import find_rewards
from jaxlm.run.pair_scores import PairScores
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train import engine
from parity_tests import pairs
from parity_tests.tolerances import FLOAT64
from tests.devices import on_devices
from torch_ref.models import attach_lora
from torch_ref.recipes import reward as torch_reward

IMPORTED = engine, reward
pytestmark = pytest.mark.usefixtures("on_one_device")
BYTES = Tokenizer.bytes_level()
SETTINGS: dict[str, Any] = {
    "recipe": "reward",
    "tokenizer": {"kind": "bytes"},
    "data": {"seq_len": 128, "validation_fraction": 0.2},
    "preference": {"pairs_per_row": 2, "template": "plain"},
    "train": {"steps": 4, "batch_size": 8, "warmup_steps": 0, "schedule": "constant", "learning_rate": 1e-2},
    "numerics": {"params": "float64", "compute": "float64", "matmul": "highest"},
    "eval": {"every": 2, "batches": 8},
    "log": {"every": 1},
}
EXAMINED = [f"validation_{name}" for name in ("accuracy", "loss", "auc", "ece", "length_correlation")]
SIZES = {"n_layers": 1, "d_model": 16, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which the chosen answer is polite, and a language model to begin with."""
    folder, rng = tmp_path_factory.mktemp("reward"), np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefg"), rng.integers(1, 9))) for _ in range(60)]
    rows = [{"prompt": f"say {a}", "chosen": f"{a} please", "rejected": b} for a, b in itertools.pairwise(words)]
    rows = [row | {"margin": 0.1 * (number % 3)} for number, row in enumerate(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = settings(folder, "none", "lm", numerics={})
    params = jax.tree.map(lambda x: np.asarray(x, "float32"), pairs.random_params(cfg.model, rng))
    Model(cfg, params, BYTES).save(folder / "start")
    return folder


def settings(folder: Path, name: str, head: str = "reward", **sections: Any) -> config.Config:
    model = {**SIZES, "vocab_size": BYTES.vocab_size, "max_seq_len": 128, "head": head}
    beside = {"source": str(folder / "pairs.jsonl"), **SETTINGS["data"]}
    begun = {**SETTINGS["train"], "init_from": str(folder / "start")}
    tree = {**SETTINGS, "data": beside, "train": begun, **sections, "model": model, "out_dir": str(folder / name)}
    return toml.from_dict(tree)


def unjudged(folder: Path) -> dict[str, Any]:
    """Data of a run that nobody judges: it compiles one program less."""
    return {**SETTINGS["data"], "source": str(folder / "pairs.jsonl"), "validation_fraction": 0.0}


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(folder: Path, name: str, **sections: Any) -> None:
    trees, rows = [], []
    for backend in ("jax", "torch"):
        cfg = settings(folder, f"{name}-{backend}", **sections)
        start.run(cfg, backend=backend)  # pyright: ignore[reportArgumentType]
        run = folder / f"{name}-{backend}"
        rows.append([row for row in metrics(run) if "loss" in row or "validation_accuracy" in row])
        found = jaxlm.load(run)
        trees.append({key: np.asarray(x) for key, x in to_torch(jax.device_get(found.params), found.config.model)})
    for ours, theirs in zip(*rows, strict=True):
        for key in ("loss", "correct", "chosen", "rejected", "longer", *EXAMINED):
            FLOAT64.check(pairs.error(np.array(theirs.get(key, 0.0)), np.array(ours.get(key, 0.0))), key)
    for key, distance, _ in pairs.differences(*reversed(trees)):
        FLOAT64.check(distance, key)


@pytest.mark.usefixtures("pages", "on_all_devices")
def test_whole_runs_of_the_command(folder: Path) -> None:
    compare(folder, "whole", reward={"centring": 0.02, "label_smoothing": 0.1})
    rows = metrics(folder / "whole-jax")
    losses, judged = (
        [row["loss"] for row in rows if "loss" in row],
        [row for row in rows if "validation_accuracy" in row],
    )
    assert losses[-1] < losses[0] and len(judged) == 2
    assert judged[-1]["validation_pairs"] >= 5 and 0 <= judged[-1]["validation_accuracy"] <= 1
    assert judged[0]["validation_longer"] == judged[1]["validation_longer"] > 0.5, "polite answers are longer"
    scores = PairScores.read(folder / "whole-jax")
    assert scores is not None and len(scores.chosen) == judged[-1]["validation_pairs"]
    for name in ("accuracy", "longer"):  # pair by pair what the sums of the objective say
        assert scores.figures()[name] == pytest.approx(judged[-1][f"validation_{name}"], abs=1e-12)
    assert scores.chosen.mean() == pytest.approx(judged[-1]["validation_chosen"], abs=1e-12)
    assert judged[-1]["validation_swap_drift"] < 1e-12 and 0 <= judged[-1]["validation_ece"] <= 1
    assert "Held-out pairs" in (folder / "whole-jax" / "report.html").read_text()


@pytest.mark.soak
@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 2, "tensor": 2, "rules": {"kv_heads": []}}, {"data": 1, "fsdp": 8}], ids=str
)
def test_eight_devices_are_one(folder: Path, mesh: dict[str, Any]) -> None:
    """Losses, gradients and what is judged, with the head and the trunk split over the devices."""
    found = []
    for number, (count, sizes) in enumerate(((1, {}), (8, mesh))):
        run = f"{mesh['fsdp']} {number}"
        with on_devices(count):
            start.run(settings(folder, run, mesh=sizes, reward={"centring": 0.02, "label_smoothing": 0.1}))
        rows = metrics(folder / run)
        found.append([row[key] for row in rows for key in ("loss", "grad_norm", *EXAMINED) if key in row])
    assert len(found[0]) > 8
    np.testing.assert_allclose(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_adapters_beside_a_head_that_is_trained_whole(folder: Path) -> None:
    """Losses, accuracy and the merged model; a checkpoint has adapters and the head, no trunk, and opens as a model."""
    compare(folder, "adapters", lora={"rank": 2}, data=unjudged(folder))
    run = folder / "adapters-torch" / "checkpoints" / "4" / "model.safetensors"
    stored = {name for name in MappedFile(run).entries if ".adapter." not in name}
    assert stored == {"score.weight", "score.bias"}
    _, trained = open_adapters(folder / "adapters-jax")
    assert trained.keys() == {"layers_0", "score"}, "nothing else is in a checkpoint"
    cfg = settings(folder, "x")
    begun, now = draw_head(cfg.model, cfg.seed)["score.kernel"], np.asarray(trained["score"]["kernel"])
    assert (begun != now).all(), "the head that began as noise is trained"
    base, merged = (
        {name: np.asarray(x) for name, x in to_torch(model.params, model.config.model)}
        for model in (jaxlm.load(folder / name) for name in ("start", "adapters-jax"))
    )
    moved = {name for name in base.keys() & merged.keys() if not np.allclose(base[name], merged[name], atol=1e-6)}
    assert moved == {f"{name}.weight" for name in attach_lora.sites(jaxlm.load(folder / "start").to_torch())}
    assert len(Scorer.open(folder / "adapters-jax").score([("say abc", "abc please")])) == 1


def test_a_run_resumes_bit_for_bit(folder: Path) -> None:
    options = {"reward": {"centring": 0.02, "label_smoothing": 0.1}, "data": unjudged(folder)}
    few = {**SETTINGS["train"], "steps": 2, "init_from": str(folder / "start")}
    start.run(settings(folder, "parts", train=few, **options))
    start.run(settings(folder, "parts", **options), resume=True)
    whole = settings(folder, "again", **options)
    start.run(whole)
    jax.tree.map(np.testing.assert_array_equal, *(jaxlm.load(folder / name).params for name in ("parts", "again")))


def test_a_fault_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen and rejected exchanged on one side."""
    original = torch_reward.reward_loss
    monkeypatch.setattr(torch_reward, "reward_loss", lambda scores, *args, **kw: original(-scores, *args, **kw))
    with pytest.raises(AssertionError, match="loss"):
        begun = {**SETTINGS["train"], "steps": 1, "init_from": str(folder / "start")}
        compare(folder, "fault", train=begun, data=unjudged(folder))


def test_documents_that_see_each_other_drift(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: all answers of a row are one document for the attention, so their order changes the scores."""
    original = torch_reward.document_scores

    def leaking(modules: Any, cfg: Any) -> Any:
        decoder, hidden = modules["model"], modules["model"].hidden

        def as_one(ids: Any, positions: Any, segments: Any) -> Any:
            return hidden(ids, torch.arange(ids.shape[1]).expand(ids.shape), segments.clamp(max=1))

        def compute(batch: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decoder, "hidden", as_one)
                return original(modules, cfg)(batch)

        return compute

    monkeypatch.setattr(torch_reward, "document_scores", leaking)
    begun = {**SETTINGS["train"], "steps": 2, "init_from": str(folder / "start")}
    start.run(settings(folder, "leaks", train=begun), backend="torch")
    (judged,) = (row for row in metrics(folder / "leaks") if "validation_swap_drift" in row)
    assert judged["validation_swap_drift"] > 1e-4


def test_a_reward_model_rewards_samples(folder: Path) -> None:
    """Its score of an answer is that of a packed row of its training; what is no reward model is refused at once."""
    start.run(settings(folder, "judge", numerics={}, data=unjudged(folder)))
    pair = {"prompt": "say abc", "chosen": "abc please", "rejected": "gf"}
    (folder / "one.jsonl").write_text(json.dumps(pair))
    data = {**SETTINGS["data"], "source": str(folder / "one.jsonl"), "validation_source": str(folder / "pairs.jsonl")}
    batch = next(PreferenceSource.open(settings(folder, "x", data=data), BYTES).batches(batch_size=1, rows=None))
    places = [jnp.asarray(batch[name]) for name in ("tokens", "positions", "segments")]
    model, how = jaxlm.load(folder / "judge"), {"documents": 2, "method": "score_documents"}
    wanted: Any = model.decoder.apply({"params": model.params}, *places, **how)  # pyright: ignore[reportArgumentType]
    reward_of = find_rewards([f"reward_model(path={str(folder / 'judge')!r}) * 0.5"])[0]
    found = np.array([reward_of(pair["prompt"], pair[side], {}) for side in ("chosen", "rejected")], np.float64)
    np.testing.assert_allclose(found, np.asarray(wanted[0])[0, :, 0], rtol=1e-4, atol=1e-6)
    assert reward_of.weight == 0.5 and found[0] != found[1]
    with pytest.raises(UserError, match=r"model\.head = 'lm' is no reward model"):
        find_rewards([f"reward_model(path={str(folder / 'start')!r})"])
    with pytest.raises(UserError, match="no such folder"):
        find_rewards(["reward_model(path='nowhere')"])


def test_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match=r"the recipe reward: model\.head = 'lm' scores no answer"):
        make_recipe(settings(folder, "lm", "lm"))
    with pytest.raises(UserError, match=r"reward\.label_smoothing = 0\.5 must be below 0\.5"):
        settings(folder, "smooth", reward={"label_smoothing": 0.5})
