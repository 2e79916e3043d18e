"""Fine-tuning on conversations: it learns the answers, trains nothing else, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config
from jaxlm.config import toml
from jaxlm.data.turns.source import ConversationSource
from jaxlm.errors import UserError
from jaxlm.recipes import start
from jaxlm.run.metrics import read_metrics

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


def test_rows_are_functions_of_their_number(tmp_path: Path) -> None:
    source = ConversationSource.open(sft(tmp_path), None)
    whole = source.batches(batch_size=4, rows=None)
    whole.set_state({"next_index": 7})
    batch = next(whole)
    for part in ([0, 1], [2, 3]):
        share = source.batches(batch_size=4, rows=np.array(part))
        share.set_state({"next_index": 7})
        np.testing.assert_array_equal(next(share)["tokens"], batch["tokens"][part])


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
