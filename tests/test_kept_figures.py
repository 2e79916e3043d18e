"""A command that measures a part of a benchmark's figures leaves the others, with the command that each is of."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kept import Kept, this_command
from benchmarks.peers import save_figures


def test_figures_of_other_commands_stay(tmp_path: Path) -> None:
    path = tmp_path / "rl.json"
    before = {"figures": {"a": {"value": 1}, "b": {"value": 2}}, "command": "python -m benchmarks.rl", "time": "then"}
    path.write_text(json.dumps(before))
    kept = Kept(tmp_path / "figures.json")
    kept.put("b", {"steps": 3}, {"value": 4})
    save_figures("rl", kept.figures, path)
    record = json.loads(path.read_text())
    assert record["figures"]["a"] == {"value": 1, "measured": {"command": "python -m benchmarks.rl", "time": "then"}}
    assert record["figures"]["b"]["value"] == 4
    assert record["figures"]["b"]["measured"]["command"] == this_command() == record["command"]
    save_figures("rl", {"c": {"value": 5}}, path)
    assert json.loads(path.read_text())["figures"].keys() == {"a", "b", "c"}
    assert json.loads(path.read_text())["figures"]["b"] == record["figures"]["b"]
