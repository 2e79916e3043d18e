"""What happens when: guard, validation, early stop, samples, reports, files of a run."""

import json
import re
import shutil

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.run.metrics import MetricsLog, read_metrics
from jaxlm.train import loop
from jaxlm.train.engine import JaxEngine
from jaxlm.train.recipe import Judge

pytestmark = pytest.mark.usefixtures("one_device")
OPTIONS = ("model.dropout=0.0", "train.microbatches=1", "model.layer_loop=unroll")


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the loss of some steps NaN."""

    def make(bad_steps) -> None:
        original, count = JaxEngine.step, [0]

        def step(engine, batch):
            count[0] += 1
            if count[0] in bad_steps:
                batch = {**batch, "weights": np.full_like(batch["weights"], np.nan)}
            return original(engine, batch)

        monkeypatch.setattr(JaxEngine, "step", step)

    return make


def test_a_non_finite_update_is_skipped_and_said(runs, tmp_path, poison, capsys):
    poison({3, 6})
    assert runs.train(tmp_path, *OPTIONS, "log.every=5").step == 12
    said = re.findall(r"step (\d+): loss or gradient not finite, update skipped", capsys.readouterr().err)
    assert said == ["3", "6"], "each is said, though metrics come to the host every 5 steps"


@pytest.mark.parametrize("every", [1, 4, 100])
def test_too_many_in_a_row_stop_the_run_with_the_last_good_state(runs, tmp_path, poison, leaves, every):
    options = (*OPTIONS, "train.schedule=constant")
    runs.train(tmp_path / "good", *options, "checkpoint.every=4", "checkpoint.keep=9")
    for other in ("5", "8", "10", "12"):
        shutil.rmtree(tmp_path / "good" / "checkpoints" / other)
    poison(range(5, 100))
    with pytest.raises(UserError, match=r"3 updates in a row were not finite, up to step 7 \(the last good"):
        runs.train(tmp_path / "bad", *options, "train.max_skips=3", f"log.every={every}", "checkpoint.every=0")
    bad, good = leaves(tmp_path / "bad"), leaves(tmp_path / "good")
    names = [name for name in good if name.startswith("params")]
    assert names and all(np.array_equal(bad[name], good[name]) and np.isfinite(bad[name]).all() for name in names)
    assert bad["optimizer['skipped']"] >= 3


@pytest.mark.usefixtures("pages")
def test_a_run_is_whole(runs, tmp_path, rows):
    runs.train(tmp_path, *OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.toml",
        "tokenizer.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    steps = {key: [row["step"] for row in rows(tmp_path) if key in row] for key in ("loss", "validation_loss")}
    assert steps == {"loss": [1, 2, 4, 6, 8, 10, 12], "validation_loss": [5, 10, 12]}
    train, validation = (row for row in rows(tmp_path) if row["step"] == 10)
    assert train.keys() >= {"tokens", "loss", "nll", "accuracy", "weight", "grad_norm", "learning_rate", "skipped"}
    assert train["tokens"] == 10 * 4 * 16
    assert validation["validation_perplexity"] == pytest.approx(np.exp(validation["validation_loss"]))


def test_a_sample_that_does_not_fit_stops_nothing(runs, tmp_path, capfd):
    positions = ("model.positions=learned", 'sample.prompts=["a"]', "sample.max_new_tokens=99")
    assert runs.train(tmp_path, *OPTIONS, *positions).step == 12
    assert (tmp_path / "checkpoints" / "12").is_dir()
    assert "no sample: a prompt of 1 and 99 new tokens exceed" in capfd.readouterr().err


def test_samples_are_kept(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(JaxEngine, "complete", lambda engine, prompts, *_: [f"<{p}>" for p in prompts])
    runs.train(tmp_path, *OPTIONS, 'sample.prompts=["a", "b"]', "sample.every=5")
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "00000005.txt",
        "00000010.txt",
        "00000012.txt",
    ]
    assert (tmp_path / "samples" / "00000005.txt").read_text() == "a<a>\n\n----\n\nb<b>\n"


def test_early_stop(runs, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(JaxEngine, "evaluate", lambda *_: {"nll": next(losses), "weight": 1.0, "accuracy": 0.0})
    options = (*OPTIONS, "eval.every=2", "eval.patience=2", "checkpoint.every=0", "checkpoint.keep=1")
    progress = runs.train(tmp_path, *options)
    assert (progress.step, progress.best, progress.stale) == (8, 2.0, 2)
    assert "early stop: no improvement in 2 validations" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]  # the best and the last
    assert runs.train(tmp_path, *options, resume=True).step == 8


def test_a_run_ends_when_its_target_is_reached(runs, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 1.9])
    monkeypatch.setattr(JaxEngine, "evaluate", lambda *_: {"nll": next(losses), "weight": 1.0, "accuracy": 0.0})
    options = (*OPTIONS, "eval.every=2", "eval.target=2.0", "checkpoint.every=0")
    assert runs.train(tmp_path, *options).step == 4
    assert "early stop: eval.target is reached" in capsys.readouterr().err
    assert runs.train(tmp_path, *options, resume=True).step == 4
    assert runs.train(tmp_path, *options, "eval.target=1.95", resume=True).step == 6


def test_a_target_is_reached_from_the_worse_side():
    of_loss = Judge(lambda sums: {}, "loss")
    of_accuracy = Judge(lambda sums: {}, "accuracy", lower_is_better=False)
    assert [of_loss.reaches(of_loss.score({"loss": x}), 0.4) for x in (0.5, 0.4, 0.3)] == [False, True, True]
    assert [of_accuracy.reaches(of_accuracy.score({"accuracy": x}), 0.4) for x in (0.3, 0.4)] == [False, True]
    assert not of_accuracy.reaches(of_accuracy.score({"accuracy": 1.0}), 0.0)


def test_metrics_after_the_checkpoint_are_dropped_and_non_finite_ones_are_null(runs, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(tmp_path, runs.config(tmp_path).log, {}, 2)
    log.write({"step": 3, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null, "grad_norm": null}\n'
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_disk_that_fails_is_one_error(tmp_path):
    message = r"No space left on device \(mend it, then continue with --resume\)"
    with pytest.raises(UserError, match=message), loop._writing(tmp_path):
        raise OSError(28, "No space left on device")


def test_json_lines_are_plain(runs, tmp_path):
    runs.train(tmp_path, *OPTIONS, "train.steps=1")
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
