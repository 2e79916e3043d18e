"""Fine-tuning on conversations: it learns the answers, trains nothing else, and resumes bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jaxlm import config
from jaxlm.config import toml
from jaxlm.data.turns.source import ConversationSource
from jaxlm.errors import UserError
from jaxlm.infer.text import end_ids
from jaxlm.recipes import start
from jaxlm.run.metrics import read_metrics
from jaxlm.text.chat import Chat
from jaxlm.train import engine  # two threads that import at once break Python's ast

IMPORTED = engine

QUESTIONS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]


def talks(path: Path) -> Path:
    lines = [{"prompt": f"say {word}", "completion": f"{word}!"} for word in QUESTIONS * 4]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft(folder: Path, name: str = "run", **options: str) -> config.Config:
    return toml.from_dict(
        {
            "recipe": "sft",
            "out_dir": str(folder / name),
            "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64},
            "tokenizer": {"kind": "bytes"},
            "data": {"source": str(talks(folder / "talks.jsonl")), "seq_len": 64, "validation_fraction": 0.2},
            "train": {"steps": 12, "batch_size": 8, "warmup_steps": 1, "learning_rate": 1e-2},
            "eval": {"every": 0, "batches": 2},
            "sample": {"prompts": ()},
            "checkpoint": {"every": 6},
            "log": {"every": 1},
            **options,
        }
    )


def test_only_what_the_assistant_says_counts(tmp_path: Path) -> None:
    source = ConversationSource.open(sft(tmp_path), None)
    batch = next(source.batches(batch_size=2, rows=None))
    said = source.tokenizer.decode(batch["targets"][batch["weights"] > 0].tolist())
    assert "!" in said and "say" not in said
    assert 0 < (batch["weights"] > 0).mean() < 0.6


def test_conversations_that_are_held_out_and_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(talks(tmp_path / "talks.jsonl"))
    data: Any = {"source": path, "validation_source": path, "seq_len": 64}
    ConversationSource.open(sft(tmp_path, data=data), None)
    assert "32 of 32 validation conversations are training conversations to the letter" in caplog.text
    caplog.clear()
    ConversationSource.open(sft(tmp_path), None)
    assert "training conversations" not in caplog.text, "the split goes by the example"


def test_rows_are_functions_of_their_number(tmp_path: Path) -> None:
    source = ConversationSource.open(sft(tmp_path), None)
    whole = source.batches(batch_size=4, rows=None)
    whole.set_state({"next_index": 7})
    batch = next(whole)
    for part in ([0, 1], [2, 3]):
        share = source.batches(batch_size=4, rows=np.array(part))
        share.set_state({"next_index": 7})
        np.testing.assert_array_equal(next(share)["tokens"], batch["tokens"][part])


@pytest.mark.usefixtures("on_one_device", "pages")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_it_learns(tmp_path: Path, backend: config.Backend) -> None:
    start.run(sft(tmp_path), backend=backend)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    assert any("validation_loss" in row for row in rows)
    assert "validation_bits_per_byte" not in rows[-1], "there is no corpus of text"


def test_a_stage_of_conversations_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trains no tokenizer"):
        ConversationSource.open(sft(tmp_path, tokenizer={"kind": "bpe"}), None)  # pyright: ignore[reportArgumentType]


def test_conversations_can_be_looked_at(tmp_path: Path) -> None:
    cfg = sft(tmp_path)
    report = start.inspect_data(cfg, step=2, rows=2)
    assert [row.number for row in report.rows] == [8, 9]
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(report)
    shown, plain = capture.get(), re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert "conversations," in plain and "held out; 0 too long, 0 cut" in plain and "% padding" in plain
    assert "trained is green" in plain and "\x1b[30;42m" in shown
    first = report.rows[0].as_dict()
    green = [t for t, w in zip(first["targets"], first["weights"], strict=True) if w]
    assert set(report.tokenizer.decode(green)) <= set("".join(QUESTIONS) + "!<|end|>")
    with pytest.raises(UserError, match="the run has the steps 1 to 12"):
        start.inspect_data(cfg, step=13)


def test_only_data_that_is_there_can_be_looked_at(tmp_path: Path) -> None:
    cfg = sft(tmp_path, recipe="tests.toy_stage:recipe")
    with pytest.raises(UserError, match="shows corpora, conversations, pairs and prompts"):
        start.inspect_data(cfg)


@pytest.mark.usefixtures("on_all_devices")
def test_a_run_keeps_what_decides_about_its_chats(tmp_path: Path) -> None:
    start.run(sft(tmp_path, train={"steps": 1, "batch_size": 8}))  # pyright: ignore[reportArgumentType]
    source = ConversationSource.open(sft(tmp_path), None)
    chat = Chat.of(source.tokenizer, beside=tmp_path / "run")
    assert chat.template.source == source.chat.template.source and chat.ends == source.chat.ends
    assert source.tokenizer.specials["end_of_turn"] in end_ids(tmp_path / "run")
