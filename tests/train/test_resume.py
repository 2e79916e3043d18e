"""A run that was stopped and resumed is bitwise the run that was not."""

import functools
import os
import shutil
import signal

import numpy as np
import pytest

from jaxlm.convert.write_model import convert
from jaxlm.errors import UserError
from jaxlm.train import loop
from jaxlm.train.engine import JaxEngine

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="session")
def undisturbed(runs, tmp_path_factory, leaves, rows):
    """A function from the kind of layer loop to the directory, arrays and metrics of a run that nobody disturbs."""

    @functools.cache
    def make(layer_loop: str):
        out = tmp_path_factory.mktemp(layer_loop)
        runs.train(out, f"model.layer_loop={layer_loop}")
        return out, leaves(out), rows(out)

    return make


def stop_after(monkeypatch, step: int, action) -> None:
    """Call `action` while step number `step` is being dispatched, once."""
    original, calls = JaxEngine.step, []

    def stepped(engine, batch):
        calls.append(1)
        if len(calls) == step:
            action()
        return original(engine, batch)

    monkeypatch.setattr(JaxEngine, "step", stepped)


def assert_same(run, undisturbed, leaves, rows) -> None:
    _, arrays, metrics = undisturbed
    found = leaves(run)
    assert found.keys() == arrays.keys() and len(arrays) > 20
    for name, expected in arrays.items():
        assert np.array_equal(found[name], expected), name
    assert rows(run) == metrics


@pytest.mark.parametrize(
    ("layer_loop", "name", "step"),
    [("scan", "SIGTERM", 7), ("unroll", "SIGINT", 9)],
)
def test_a_signal_saves_and_resuming_is_bitwise(
    runs, undisturbed, tmp_path, monkeypatch, leaves, rows, layer_loop, name, step, capsys
):
    options = (f"model.layer_loop={layer_loop}",)
    with monkeypatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(SystemExit) as left:
            runs.train(tmp_path, *options)
    assert left.value.code == {"SIGTERM": 75, "SIGINT": 130}[name]
    assert f"{name}: saved step {step}; continue with --resume" in capsys.readouterr().err
    assert runs.train(tmp_path, *options, resume=True).step == 12
    assert f"resuming {tmp_path} from step {step}" in capsys.readouterr().out
    assert_same(tmp_path, undisturbed(layer_loop), leaves, rows)


@pytest.mark.parametrize(("layer_loop", "step"), [("unroll", 2), ("scan", 8)])  # before and after the first checkpoint
def test_an_exception_loses_only_the_steps_since_the_last_checkpoint(
    runs, undisturbed, tmp_path, monkeypatch, leaves, rows, layer_loop, step
):
    def fail():
        raise ZeroDivisionError

    options = (f"model.layer_loop={layer_loop}",)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_after(patch, step, fail)
        runs.train(tmp_path, *options)
    runs.train(tmp_path, *options, resume=True)
    assert_same(tmp_path, undisturbed(layer_loop), leaves, rows)


def test_a_second_ctrl_c_leaves_at_once(runs, tmp_path, monkeypatch):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored, where pytest runs in the background
    stop_after(monkeypatch, 5, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        runs.train(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_changes_nothing(runs, undisturbed, leaves, rows):
    runs.train(undisturbed("unroll")[0], "model.layer_loop=unroll", resume=True)
    assert_same(undisturbed("unroll")[0], undisturbed("unroll"), leaves, rows)


def test_a_converted_run_says_why_it_cannot_be_resumed(runs, undisturbed, tmp_path):
    for options in ({}, {"shard_bytes": 10_000}):
        convert(undisturbed("unroll")[0], tmp_path / "run", "jaxlm", overwrite=True, **options)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="parameters from a conversion, without an optimizer to resume"):
            runs.train(tmp_path / "run", "model.layer_loop=unroll", resume=True)
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_cut_line_of_the_metrics_is_written_again(runs, undisturbed, tmp_path, leaves, rows):
    shutil.copytree(undisturbed("unroll")[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20] + b"\xff\0")
    runs.train(tmp_path / "run", "model.layer_loop=unroll", resume=True)
    assert_same(tmp_path / "run", undisturbed("unroll"), leaves, rows)


def test_due():
    assert [step for step in range(1, 11) if loop._due(4, step, step == 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if loop._due(0, step, step == 10)] == [10]
