"""What a run tells of itself: where its time went, its memory, a profile, who is late."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import pytest

from jaxlm.errors import UserError
from jaxlm.run.clock import ASIDE, Clock
from jaxlm.run.metrics import SECONDS, read_metrics
from jaxlm.train.engine import JaxEngine

pytestmark = pytest.mark.usefixtures("one_device", "traced_once")
OPTIONS = ("model.dropout=0.0", "train.microbatches=1", "model.layer_loop=unroll")


@pytest.mark.usefixtures("pages")
def test_rows_tell_where_time_went(runs: Any, tmp_path: Path) -> None:
    runs.train(tmp_path, *OPTIONS, "train.steps=6")
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    for row in rows:
        seconds = {name.removeprefix(SECONDS): value for name, value in row.items() if name.startswith(SECONDS)}
        assert seconds.keys() == {"compute", *ASIDE} and min(seconds.values()) >= 0
        assert 0 <= row["goodput"] < 1 and row["step_seconds"] > 0
        assert row["memory_peak_bytes"] >= row["memory_bytes"] > 1e7
    assert rows[0][SECONDS + "startup"] > 0 and all(row[SECONDS + "startup"] == 0 for row in rows[1:])
    assert any(row[SECONDS + "checkpoint"] > 0 for row in rows) and any(row[SECONDS + "evaluation"] > 0 for row in rows)
    assert rows[-1]["goodput"] > 0
    assert (tmp_path / "plots" / "time.png").read_bytes().startswith(b"\x89PNG")
    assert "shares of time" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_goodput_remembers_the_time_before_a_restart(
    runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.train(tmp_path, *OPTIONS, "train.steps=4")
    later = functools.partial(Clock, wall=lambda: time.time() + 3600)
    monkeypatch.setattr("jaxlm.train.loop.Clock", later)
    runs.train(tmp_path, *OPTIONS, "train.steps=6", resume=True)
    row = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "goodput" in row][-1]
    assert row["step"] == 6 and row["goodput"] < 0.05, "an hour in which nothing ran"


def test_a_profile_of_some_steps(runs: Any, tmp_path: Path) -> None:
    runs.train(tmp_path, *OPTIONS, "train.steps=4", "train.profile_steps=2:3")
    (trace,) = (tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert b"train" in trace.read_bytes()


def test_a_profile_that_the_end_cuts_short_is_written(runs: Any, tmp_path: Path) -> None:
    runs.train(tmp_path, *OPTIONS, "train.steps=3", "train.profile_steps=3:9")
    assert list((tmp_path / "profile" / "plugins" / "profile").glob("*/*.xplane.pb"))


@pytest.mark.parametrize("wrong", ["10", "0:3", "5:4", "a:b", "-1:2"])
def test_windows_that_are_none(runs: Any, tmp_path: Path, wrong: str) -> None:
    with pytest.raises(UserError, match=r"train.profile_steps = .* is not FIRST:LAST"):
        runs.config(tmp_path, f'train.profile_steps="{wrong}"')


def test_a_late_process_is_named(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Of four processes, the last of which waits for its data."""
    monkeypatch.setattr(JaxEngine, "gather", lambda _, value: [value, value, value, value + 100.0])
    runs.train(tmp_path, *OPTIONS, "train.steps=1")
    assert "step 1: process 3 kept the others waiting, 100." in " ".join(capsys.readouterr().err.split())
    (row,) = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row]
    assert math.isclose(row["late_process_3"], 100, rel_tol=0.5) and "late_process_0" not in row
