"""A run that was stopped and resumed is bitwise the run that was not."""

import os
import signal

import numpy as np
import pytest

from jaxlm.train import loop
from jaxlm.train.engine import JaxEngine

pytestmark = pytest.mark.usefixtures("one_device")
LOOPS = ("scan", "unroll")


@pytest.fixture(scope="session", params=LOOPS)
def layer_loop(request):
    return f"model.layer_loop={request.param}"


@pytest.fixture(scope="session")
def undisturbed(runs, layer_loop, tmp_path_factory, leaves, rows):
    """Arrays and metrics of the run that nobody disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.devices", lambda devices=__import__("jax").devices()[:1]: devices)
        out = tmp_path_factory.mktemp("undisturbed")
        runs.train(out, layer_loop)
    return leaves(out), rows(out)


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
    arrays, metrics = undisturbed
    found = leaves(run)
    assert found.keys() == arrays.keys() and len(arrays) > 20
    for name, expected in arrays.items():
        assert np.array_equal(found[name], expected), name
    assert rows(run) == metrics


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("step", [1, 7, 9])
def test_a_signal_saves_and_resuming_is_bitwise(
    runs, layer_loop, undisturbed, tmp_path, monkeypatch, leaves, rows, name, step, capsys
):
    with monkeypatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), getattr(signal, name)))
        assert runs.train(tmp_path, layer_loop).step == step
    assert f"{name}: saved step {step}; continue with --resume" in capsys.readouterr().err
    assert runs.train(tmp_path, layer_loop, resume=True).step == 12
    assert f"resuming {tmp_path} from step {step}" in capsys.readouterr().out
    assert_same(tmp_path, undisturbed, leaves, rows)


@pytest.mark.parametrize("step", [2, 8])  # before the first checkpoint, and two steps after the second
def test_an_exception_loses_only_the_steps_since_the_last_checkpoint(
    runs, layer_loop, undisturbed, tmp_path, monkeypatch, leaves, rows, step
):
    def fail():
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_after(patch, step, fail)
        runs.train(tmp_path, layer_loop)
    runs.train(tmp_path, layer_loop, resume=True)
    assert_same(tmp_path, undisturbed, leaves, rows)


def test_a_second_ctrl_c_leaves_at_once(runs, tmp_path, monkeypatch):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 5, interrupt_twice)
        runs.train(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert runs.train(tmp_path, resume=True).step == 12


def test_resuming_a_finished_run_changes_nothing(runs, layer_loop, undisturbed, tmp_path, leaves, rows):
    for resume in (False, True):
        runs.train(tmp_path, layer_loop, resume=resume)
        assert_same(tmp_path, undisturbed, leaves, rows)


def test_a_resumed_run_may_be_longer(runs, tmp_path, leaves, rows):
    longer = ("train.schedule=constant", "train.steps=12")
    runs.train(tmp_path / "whole", *longer)
    runs.train(tmp_path / "parts", "train.schedule=constant", "train.steps=10")  # 10: also a validation
    runs.train(tmp_path / "parts", *longer, resume=True)
    whole, parts = leaves(tmp_path / "whole"), leaves(tmp_path / "parts")
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)


def test_due():
    assert [step for step in range(1, 11) if loop._due(4, step, step == 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if loop._due(0, step, step == 10)] == [10]
