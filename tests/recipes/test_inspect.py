"""`jaxlm data inspect` of pairs and of prompts: what counts, what was left out, and a line a row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from jaxlm.cli.app import app
from jaxlm.config import toml
from jaxlm.errors import UserError
from jaxlm.recipes import start

WORDS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]
PAIRS: list[dict[str, Any]] = [
    *({"prompt": f"say {word}", "chosen": f"{word}!", "rejected": "no."} for word in WORDS),
    {"prompt": "say the same", "chosen": "yes", "rejected": "yes"},
    {"prompt": "say which", "chosen": "one", "rejected": "two", "tie": True},
    {"prompt": "say much", "chosen": "word " * 40, "rejected": "no."},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
]
MODEL = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 24}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(folder: Path, recipe: str, **sections: dict[str, Any]) -> Any:
    options: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "tokenizer": {"kind": "bytes"},
        "data": {"seq_len": 96, "validation_fraction": 0.0},
        "train": {"steps": 6, "batch_size": 8},
    }
    merged = {key: options.get(key, {}) | sections.get(key, {}) for key in options | sections}
    return toml.from_dict({"recipe": recipe, "out_dir": str(folder / "run"), **merged})


def printed(report: Any) -> tuple[str, str]:
    """With its colours, and without."""
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(report)
    return capture.get(), re.sub(r"\x1b\[[0-9;]*m", "", capture.get())


def decoded(report: Any, row: Any, segment: int, *, counts: bool) -> str:
    arrays = row.as_dict()
    keys = ("targets", "segments", "weights")
    return report.tokenizer.decode(
        [t for t, s, w in zip(*(arrays[key] for key in keys), strict=True) if s == segment and bool(w) == counts]
    )


@pytest.mark.parametrize(("recipe", "kept"), [("dpo", 8), ("reward", 9)])
def test_pairs_can_be_looked_at(tmp_path: Path, recipe: str, kept: int) -> None:
    """A reward model keeps ties, and says so where they stand."""
    data = {"source": written(tmp_path / "pairs.jsonl", PAIRS)}
    head = {"head": "reward"} if recipe == "reward" else {}
    cfg = config_of(tmp_path, recipe, data=data, model=head, preference={"loss": "orpo", "pairs_per_row": 2})
    report = start.inspect_data(cfg, rows=8)
    shown, plain = printed(report)
    assert f"{kept} pairs to train on, 0 of them cut; 0 held out" in plain
    left = f"1 too long, 1 with equal answers, {9 - kept} ties, 0 without an answer, 1 whose sides are not answers"
    assert f"left out: {left} to one prompt" in plain
    assert "% of the tokens are trained" in plain and "% padding" in plain and "\x1b[30;42m" in shown
    assert ("chosen, a tie: " in plain) == (recipe == "reward")
    row = next(row for row in report.rows if row.name(1) == "chosen")
    assert decoded(report, row, 1, counts=True).rstrip().startswith(tuple(f"{word}!" for word in WORDS))
    assert decoded(report, row, 2, counts=True).startswith("no.") and "say" in decoded(report, row, 2, counts=False)
    names = row.as_dict()["answers"]
    assert names[:2] == ["chosen", "rejected"] and len(names) == 2 * row.pairs
    with pytest.raises(UserError, match="--step 7: the run has the steps 1 to 6"):
        start.inspect_data(cfg, step=7)


def test_labelled_answers_are_named(tmp_path: Path) -> None:
    """For KTO the second answer of a pair belongs to another prompt."""
    rows = [{"prompt": f"say {w}", "completion": w, "label": i % 2 == 0} for i, w in enumerate(WORDS)]
    start_of_run = {"loss": "kto", "reference": str(tmp_path), "pairs_per_row": 1}
    cfg = config_of(tmp_path, "dpo", data={"source": written(tmp_path / "x.jsonl", rows)}, preference=start_of_run)
    report = start.inspect_data(cfg, rows=8)
    found = [(row.name(1), decoded(report, row, 1, counts=True).removesuffix("<|end|>")) for row in report.rows]
    assert {(name, word.strip()) for name, word in found} == {
        ("wanted" if i % 2 == 0 else "not wanted", word) for i, word in enumerate(WORDS)
    }
    assert {row.name(2) for row in report.rows} == {"answer to another prompt"}


def test_one_source_smaller_than_a_row_is_told_in_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.txt").write_text("few words\n")
    for seq_len, told in ((96, ["10"]), (10, [])):
        data = {"source": str(tmp_path / "x.txt"), "seq_len": seq_len, "cache_dir": str(tmp_path / "cache")}
        caplog.clear()
        start.inspect_data(config_of(tmp_path, "pretrain", data=data))
        assert re.findall(rf"warning: (\d+) training tokens do not fill one row of {seq_len} ", caplog.text) == told


RL = {"task": "addition(digits=1)", "prompts": 2, "group": 4, "max_new_tokens": 4, "iterations": 2}


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_prompts_of_a_task_can_be_looked_at(tmp_path: Path, recipe: str) -> None:
    """Two updates of a phase are of one pair of prompts; the next phase has the next two."""
    cfg = config_of(tmp_path, recipe, rl={**RL, "kl": "none", "rewards": ["exact_text"]})
    one, same, following = (start.inspect_data(cfg, step=step, rows=5) for step in (1, 2, 3))
    assert one.rows == same.rows and [row.number for row in one.rows] == [0, 1]
    assert [row.number for row in following.rows] == [2, 3]
    first = one.rows[0]
    assert bytes(first.prompt_ids).decode() == first.prompt and len(first.answer_ids) == len(first.answer) + 1
    assert str(sum(map(int, first.prompt[:-1].split("+")))) == first.answer
    shown, plain = printed(one)
    assert "one text of 10 is held out" in plain and "none, prompts are plain text" in plain and "\x1b[30;42m" in shown


def test_prompts_of_a_file_have_sizes_and_a_line_each(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": n + 1} for n in range(50)]
    task = written(tmp_path / "sums.jsonl", rows)
    (tmp_path / "a.toml").write_text(toml.to_toml(config_of(tmp_path, "answers", rl={"task": task})))
    report = start.inspect_data(toml.load(tmp_path / "a.toml", []), step=3, rows=2)
    sizes = re.search(r"(\d+) prompts to train on, (\d+) held out", printed(report)[1])
    assert sizes is not None and sum(map(int, sizes.groups())) == 50 and int(sizes[2]) > 0
    assert [row.number for row in report.rows] == [16, 17]
    arguments = ["data", "inspect", str(tmp_path / "a.toml"), "--json", "--step", "3", "--rows", "2"]
    answered = CliRunner().invoke(app, arguments)
    lines = [json.loads(line) for line in answered.stdout.splitlines()]
    assert lines == [row.as_dict() for row in report.rows]
    assert lines[0].keys() == {"number", "prompt", "answer", "prompt_ids", "answer_ids"}
