"""Prompts as ids, plain and by a template: what a sample continues, and what ends it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config
from jaxlm.data.prompts import is_held_out
from jaxlm.errors import UserError
from jaxlm.recipes.grpo import STAGE
from jaxlm.recipes.rollouts.asking import Asking
from jaxlm.recipes.rollouts.source import RolloutData
from jaxlm.text.chat import Chat, encode
from jaxlm.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_level()


def test_a_plain_prompt_is_its_ids_and_ends_with_the_text() -> None:
    asking = Asking.of(config.Config(), BYTES)
    assert asking.encode(["37+5=", "1"]) == [BYTES.encode("37+5="), BYTES.encode("1")]
    assert (asking.end, asking.ends, asking.answer("42")) == (BYTES.eot, {BYTES.eot}, [*BYTES.encode("42"), BYTES.eot])
    with pytest.raises(UserError, match="no sample could end"):
        Asking.of(config.Config(), Tokenizer.bytes_level(specials=False))


@pytest.mark.parametrize("template", ["auto", "jaxlm"])
def test_prompt_and_answer_of_a_template_are_what_fine_tuning_trains(template: str) -> None:
    """The answer with its end are the trained ids of the conversation, and the prompt is all that stands before."""
    asking = Asking.of(config.Config(rl=config.RL(template=template)), BYTES)
    turns = [{"role": "user", "content": "hé?"}, {"role": "assistant", "content": "yes"}]
    example = encode(Chat.of(BYTES, template), turns)
    (prompt,), answer = asking.encode(["hé?"]), asking.answer("yes")
    assert [*prompt, *answer] == example.ids.tolist()
    assert np.flatnonzero(example.weights).tolist() == list(range(len(prompt), len(prompt) + len(answer)))
    assert asking.end != BYTES.eot and {asking.end, BYTES.eot} <= asking.ends
    with pytest.raises(UserError, match=r"rl\.template = 'jaxml': no such template"):
        Asking.of(config.Config(rl=config.RL(template="jaxml")), BYTES)


def test_the_prompts_of_a_file_by_a_template(tmp_path: Path) -> None:
    """A sample ends with the assistant's turn or the text; the rows that judge a run hold the same prompts and ends."""
    rows = [{"instruction": f"say {i}", "output": f"{i}!"} for i in range(40)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config.Config(
        data=config.Data(seq_len=24),
        tokenizer=config.Tokenizer(kind="bytes"),
        train=config.Train(batch_size=4),
        rl=config.RL(task=str(file), template="jaxlm", rewards=("exact_text",), prompts=2, group=2, max_new_tokens=4),
    )
    data = RolloutData(cfg, None, STAGE)
    asking, prompt = data.phases.asking, data.task.train(0, 0)
    (ids,) = asking.encode([prompt.text])
    for end in (asking.end, BYTES.eot):
        sample = data.phases.cut(prompt, ids, [*BYTES.encode(prompt.answer), end, 7])
        assert (sample.text, sample.ended) == (prompt.answer, "end")
    held_out = [row for row in rows if is_held_out(row["instruction"])]
    (batch,) = data.held_out_batches(batch_size=8, rows=None, max_batches=1)
    assert batch["weights"].sum() == sum(len(row["output"]) + 1 for row in held_out) > 0
    last = batch["targets"][0][batch["weights"][0] > 0]
    assert last.tolist() == [*BYTES.encode(held_out[0]["output"]), asking.end]
