"""A model that several processes hold together: they make the same steps, and the first one writes and speaks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxlm
from jaxlm import config
from jaxlm.convert import open_model
from jaxlm.convert.canonical import fill
from jaxlm.errors import UserError
from jaxlm.infer.engine import Request
from jaxlm.launch.local import launch
from jaxlm.mesh import Layout
from jaxlm.processes import meet
from jaxlm.text.sampling import Sampling
from tests.test_front_door import CFG, make

LINES = [
    {"prompt": "def add(a, b):", "max_new_tokens": 5},
    {"prompt": "x = ", "max_new_tokens": 9, "seed": 3, "sampling": {"temperature": 1.0}, "n": 2, "logprobs": 1},
    {"prompt": "late", "deadline": 60.0},
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make().save("model", "torch")
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path


def test_two_processes_give_the_texts_of_one(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    usual = Request((), sampling=Sampling(temperature=0.0), max_new_tokens=20)
    assert [*jaxlm.load("model").answer_file("in.jsonl", "alone.jsonl", usual, rows=2)] == [1, 2, 3]
    one = Path("alone.jsonl").read_text().splitlines(keepends=True)
    Path("together.jsonl").write_text(one[0])  # a command that was killed goes on in both, and only the first looks
    words = ["generate", "model", "--temperature", "0", "--max-new-tokens", "20", "--rows", "2"]
    words += ["--prompts", "in.jsonl", "--out", "together.jsonl"]
    assert launch(words, processes=2, devices=2, logs=folder / "logs") == 0
    both = Path("together.jsonl").read_text().splitlines(keepends=True)
    assert both[0] == one[0] and len(both) == 3
    mine, its = json.loads(one[1]), json.loads(both[1])
    assert [choice["ids"] for choice in mine["choices"]] == [choice["ids"] for choice in its["choices"]]
    assert (mine["text"], mine["finish"], mine["usage"]) == (its["text"], its["finish"], its["usage"])
    for a, b in zip(mine["choices"], its["choices"], strict=True):
        np.testing.assert_allclose(a["log_probs"], b["log_probs"], rtol=0, atol=1e-10)
    assert "error" not in json.loads(one[2])
    assert json.loads(both[2])["error"].startswith("a deadline is of one process")
    shown = capfd.readouterr().out
    assert "3 texts" in shown and "[0]" in shown and "[1]" not in shown


@pytest.mark.soak
def test_one_prompt_is_continued_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alone = jaxlm.load("model").generate("def f", max_new_tokens=6)
    words = ["generate", "model", "def f", "--greedy", "--max-new-tokens", "6", "--json"]
    assert launch(words, processes=2, devices=1, logs=folder / "logs") == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "text" in line]
    found = json.loads(line.removeprefix("[0] "))
    assert (found["text"], found["tokens"], found["finish"]) == (alone.text, alone.tokens, alone.finish)


def test_threads_are_refused_where_processes_make_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each has a model of its own, threads are its own matter."""
    monkeypatch.setattr(meet, "several", lambda: True)
    make().engine(rows=1, warm_up=False).close()
    layout = Layout.from_config(config.Mesh(data=1, fsdp=-1))
    with pytest.raises(UserError, match=r"engine\(threaded=False\)"):
        dataclasses.replace(make(), layout=layout).engine(rows=1, warm_up=False)


def test_a_parameter_is_laid_down_before_the_next_is_read(folder: Path) -> None:
    """The host never holds the whole model: of stacked layers it holds one stack, of others one tensor."""
    opened = open_model.open_model("model")
    for loop in ("unroll", "scan"):
        cfg: Any = dataclasses.replace(opened.config.model, layer_loop=loop)
        events: list[str] = []

        class Watched(dict[str, Any]):
            def __getitem__(self, name: str, events: list[str] = events) -> np.ndarray:
                events.append("read")
                return opened.parameters[name]

        def lay(path: tuple[str, ...], leaf: np.ndarray, events: list[str] = events) -> np.ndarray:
            events.append("laid")
            return leaf

        fill(Watched(), cfg, lay)
        reads = "".join("r" if event == "read" else "L" for event in events).split("L")
        assert max(map(len, reads)) == (1 if loop == "unroll" else CFG.n_layers), loop
        assert events.count("read") == len(opened.parameters)
