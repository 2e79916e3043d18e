"""A run whose newest checkpoint is damaged is opened at the one before, on one device and on a mesh alike."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.infer import load
from jaxlm.infer.model import Model
from jaxlm.launch import local
from jaxlm.launch.local import launch
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import init_state
from tests.test_front_door import CFG, FLOAT64, make

IDS = [5, 8, 2, 100, 7]


def damage(run: Path, step: int) -> None:
    """Flip a bit in the largest file of the parameters."""
    file = max((run / "checkpoints" / str(step) / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_record(run: Path, step: int) -> None:
    """Cut the record, which is read when the checkpoint is opened, before a parameter is."""
    record = run / "checkpoints" / str(step) / "run" / "metadata"
    record.write_bytes(record.read_bytes()[:100])


@pytest.fixture(scope="module")
def models() -> dict[int, Model]:
    return {step: make(seed=step) for step in (3, 12)}


@pytest.fixture(scope="module")
def whole(models: dict[int, Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of each model."""
    run = tmp_path_factory.mktemp("whole")
    settings = config.Config(model=CFG, numerics=FLOAT64)
    models[3].save(run / "torch", "torch")
    shutil.copy(run / "torch" / "tokenizer.json", run)
    tokenizer = config.Tokenizer(kind="file", path=str(run / "tokenizer.json"))
    (run / "config.toml").write_text(toml.to_toml(dataclasses.replace(settings, tokenizer=tokenizer)))
    checkpoints = Checkpointer(run)
    with jax.enable_x64(True):
        for step, model in models.items():
            state = init_state(model.params, make_optimizer(config.Train()))
            checkpoints.save(state._replace(step=np.int32(step)), {})
        checkpoints.close()
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def assert_is(found: Model, expected: Model) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), jax.device_get(expected.params))


@pytest.mark.parametrize("mesh", [None, "zero3"])
def test_the_one_before_a_damaged_one(
    models: dict[int, Model], run: Path, mesh: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "jaxlm")
    assert_is(jaxlm.load(run, mesh=mesh), models[12])
    assert not caplog.messages
    damage(run, 12)
    assert_is(jaxlm.load(run, mesh=mesh), models[3])
    assert [message.partition(" is damaged: ")[0] for message in caplog.messages] == [str(run / "checkpoints" / "12")]
    with pytest.raises(UserError, match="checkpoints/12 is damaged: .*earlier" if mesh else "no intact checkpoint"):
        jaxlm.load(run, mesh=mesh, step=12)
    damage(run, 3)
    with pytest.raises(UserError, match=r"no intact checkpoint \(name another run\)"):
        jaxlm.load(run, mesh=mesh)


def test_the_one_before_a_damaged_record(models: dict[int, Model], run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage_record(run, 12)
    caplog.set_level(logging.WARNING, "jaxlm")
    assert_is(jaxlm.load(run, mesh="zero3"), models[3])
    assert [message.partition(" is damaged: ")[0] for message in caplog.messages] == [str(run / "checkpoints" / "12")]


def test_damage_that_another_process_finds(
    models: dict[int, Model], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All take the one before, though this process could read the newest."""
    answers = iter([False, True, True, False, True])
    monkeypatch.setattr(load, "everywhere", lambda mine: next(answers) and mine)
    assert_is(jaxlm.load(run, mesh="zero3"), models[3])
    with pytest.raises(UserError, match="another process finds step 12 damaged"):
        jaxlm.load(run, mesh="zero3", step=12)


def test_an_error_that_is_no_damage_is_raised_after_all_have_voted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    votes = []
    monkeypatch.setattr(load, "everywhere", lambda mine: votes.append(mine) or mine)
    with pytest.raises(UserError, match="no step 5"):
        jaxlm.load(run, mesh="zero3", step=5)
    assert votes == [False, False]
    monkeypatch.setattr(load, "everywhere", lambda mine: False)
    with pytest.raises(UserError, match="another process cannot open it"):
        jaxlm.load(run, mesh="zero3")


@pytest.mark.soak
@pytest.mark.parametrize("spoil", [damage, damage_record])
def test_two_processes_take_the_same(
    spoil: Callable[[Path, int], None], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(run, 12)
    words = ["generate", str(run), "def", "--greedy", "--max-new-tokens", "8", "--json"]
    assert launch(words, processes=2, devices=2, logs=tmp_path / "logs") == 0
    expected = jaxlm.load(run, step=3).generate("def", max_new_tokens=8).text
    shown = capfd.readouterr().out
    assert f'"text": {json.dumps(expected)}' in shown


CHILD = """import sys
from jaxlm import config
from jaxlm.processes import meet
me = meet.initialize(config.Distributed()).process_id
import jaxlm
print(repr(jaxlm.load(sys.argv[1 + me], mesh="zero3").generate("def", max_new_tokens=8).text), flush=True)
meet.leave(0)
"""


@pytest.mark.soak
@pytest.mark.parametrize("spoil", [damage, damage_record])
def test_damage_on_the_disk_of_one_process(
    spoil: Callable[[Path, int], None],
    run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other reads the newest to its end before it hears of it."""
    other = shutil.copytree(run, tmp_path / "other")
    spoil(other, 12)
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(local, "PROGRAM", (sys.executable, str(tmp_path / "child.py")))
    assert launch([str(run), str(other)], processes=2, devices=2, logs=tmp_path / "logs") == 0
    expected = jaxlm.load(run, step=3).generate("def", max_new_tokens=8).text
    shown = [line for line in capfd.readouterr().out.splitlines() if "damaged" not in line]
    assert sorted(shown) == [f"[{i}] {expected!r}" for i in range(2)]
