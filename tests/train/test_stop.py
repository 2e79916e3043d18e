"""A run that is told to stop saves and leaves from wherever it is, and what it broke off is done after it resumes."""

import os
import signal
import sys
import time

import pytest

from jaxlm.data.pipeline import make_train_iterator
from jaxlm.data.rows import validation
from jaxlm.errors import UserError
from jaxlm.processes.stop_signals import Interrupted, StopRequest
from jaxlm.recipes import make_recipe
from jaxlm.recipes.start import open_stage
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.engine import JaxEngine

pytestmark = pytest.mark.usefixtures("traced_once")
OPTIONS = ("model.layer_loop=unroll", 'sample.prompts=["de"]', "sample.every=5", "sample.max_new_tokens=9")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def samples(run) -> dict[str, str]:
    return {path.name: path.read_text() for path in (run / "samples").iterdir()}


def in_evaluation(patch) -> None:
    """The signal comes before the second batch of the validation of step 5."""
    original, calls = validation.validation_batches, []

    def batches(*args, **options):
        for index, batch in enumerate(original(*args, **options)):
            if index == 1 and not calls:
                calls.append(index)
                terminate()
            yield batch

    patch.setattr(validation, "validation_batches", batches)


def in_sampling(patch) -> None:
    """The signal comes when the first tokens are there."""
    original = JaxEngine.complete

    def complete(engine, prompts, sample, check):
        def signalled():
            terminate()
            check()
            pytest.fail("the sample was not broken off")

        return original(engine, prompts, sample, signalled)

    patch.setattr(JaxEngine, "complete", complete)


def in_save(patch) -> None:
    """The signal comes while the checkpoint of step 6 is written."""
    original, calls = Checkpointer._save, []

    def save(checkpointer, step, *args):
        original(checkpointer, step, *args)
        calls.append(step)
        if step == 6:
            terminate()

    patch.setattr(Checkpointer, "_save", save)
    patch.setattr(Checkpointer, "close", lambda self: (close(self), calls.count(6) == 1 or pytest.fail("saved twice")))


close = Checkpointer.close


@pytest.mark.usefixtures("one_device")
def test_what_was_broken_off_is_done_after_resuming(runs, tmp_path, monkeypatch, leaves, rows, capsys):
    runs.train(tmp_path / "whole", *OPTIONS)
    out = tmp_path / "stopped"
    for when, step in ((in_evaluation, 5), (in_sampling, 5), (in_save, 6)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
            when(patch)
            runs.train(out, *OPTIONS, resume=True)
        assert left.value.code == 75
        assert f"SIGTERM: saved step {step}; continue with --resume" in capsys.readouterr().err, when
    runs.train(out, *OPTIONS, resume=True)
    found, arrays, metrics = leaves(out), leaves(tmp_path / "whole"), rows(tmp_path / "whole")
    assert found.keys() == arrays.keys() and len(arrays) > 20
    assert all((found[name] == array).all() for name, array in arrays.items())
    assert rows(out) == metrics and samples(out) == samples(tmp_path / "whole") and len(samples(out)) == 3
    assert Checkpointer(out, read_only=True).steps() == Checkpointer(tmp_path / "whole", read_only=True).steps()


STUCK = """
import sys
import jax
from jaxlm.cli import main
from jaxlm.train.engine import JaxEngine

def stuck(engine, batch):
    print("in XLA", flush=True)
    jax.lax.while_loop(lambda x: x >= 0, lambda x: (x + 1) % 7, 0).block_until_ready()  # no bytecode, no end

JaxEngine.step = stuck
sys.exit(main())
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_while_xla_compiles_the_first_step_a_signal_ends_the_process(runs, tmp_path, monkeypatch, name, code):
    command = runs.command
    monkeypatch.setattr(runs, "command", lambda *a, **b: [sys.executable, "-c", STUCK, *command(*a, **b)[3:]])
    process = runs.start(tmp_path)
    assert process.stdout is not None and "in XLA\n" in iter(process.stdout.readline, "")
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{name}: left before the first update, nothing is trained yet; continue with --resume" in errors
    assert not any((tmp_path / "checkpoints").glob("*"))


@pytest.mark.usefixtures("one_device")
def test_a_save_when_enough_time_has_passed(runs, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    original, saved = JaxEngine.step, []

    def minute(engine, batch):
        clock[0] += 60
        return original(engine, batch)

    def save(engine, run, loss):
        saved.append(run["progress"]["step"])

    monkeypatch.setattr(JaxEngine, "step", minute)
    monkeypatch.setattr(JaxEngine, "save", save)
    runs.train(tmp_path, "eval.every=0", "checkpoint.every=5", "checkpoint.minutes=3")
    assert saved == [3, 5, 8, 10, 12]


@pytest.mark.usefixtures("one_device")
def test_another_batch_size_continues_with_the_next_row(runs, tmp_path, monkeypatch):
    read = []
    original = JaxEngine.step

    def step(engine, batch):
        read.extend(map(bytes, batch["tokens"]))
        return original(engine, batch)

    monkeypatch.setattr(JaxEngine, "step", step)
    options = ("train.microbatches=1", "eval.every=0", "model.max_seq_len=16")
    runs.train(tmp_path, *options, "train.steps=6")
    runs.train(tmp_path, *options, "train.steps=9", "train.batch_size=8", resume=True)
    cfg = runs.config(tmp_path / "undisturbed")
    cfg, _, source = open_stage(cfg, make_recipe(cfg), resume=False)
    batches = make_train_iterator(cfg.data, source.corpus, batch_size=4, seed=0)
    assert read == [bytes(row) for _ in range(12) for row in next(batches)["tokens"]]
    refusal = r"train.batch_size = 5: the checkpoint has read 48 rows, .*with the next row: 3, 4, 6, 8\)"
    with pytest.raises(UserError, match=refusal):
        runs.train(tmp_path, *options, "train.steps=12", "train.batch_size=5", resume=True)
    for option in ("seed=1", "data.seq_len=8"):
        with pytest.raises(UserError, match=rf"{option.replace('=', ' is ')}"):
            runs.train(tmp_path, *options, option, "train.batch_size=8", resume=True)


@pytest.mark.usefixtures("one_device")
def test_work_done_again_is_told(runs, tmp_path, monkeypatch, capsys):
    original = JaxEngine.step

    def step(engine, batch):
        if int(engine.state.step) == 8:
            raise ZeroDivisionError
        return original(engine, batch)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(JaxEngine, "step", step)
        runs.train(tmp_path, "eval.every=0")
    runs.train(tmp_path, "eval.every=0", resume=True)
    assert f"resuming {tmp_path} from step 6; steps 7 to 8 are done again" in capsys.readouterr().out


def test_many_processes_ask_at_the_same_points():
    asked = []

    def agreed(point: int) -> bool:
        asked.append(point)
        return point == 3

    request = StopRequest(agreed, pytest.fail)
    request.check()
    with pytest.raises(Interrupted):
        list(request.between("abc"))
    with pytest.raises(Interrupted):
        request.check()
    assert asked == [1, 2, 3] and request.stopped and request.signal_name == "SIGTERM"
