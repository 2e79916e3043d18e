"""Preferences: formats by their keys, prompts that never count, what is left out, and rows of whole pairs."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.config import toml
from jaxlm.data.preferences.formats import Labelled, Pair, preference_of
from jaxlm.data.preferences.pairs import (
    Pairs,
    encode_pairs,
    labelled_pairs,
    read_preferences,
    sides_of,
    sort_preferences,
    split,
)
from jaxlm.data.preferences.rows import PairRows
from jaxlm.data.preferences.source import PreferenceSource
from jaxlm.data.turns.records import Record
from jaxlm.errors import UserError
from jaxlm.text.chat import Chat
from jaxlm.text.tokenizer import Tokenizer

DATA = Path(os.environ.get("JAXLM_DATA", Path(__file__).parents[2] / "../shared/data"))
USER, GOOD, BAD = (
    [{"role": role, "content": text}] for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
)
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}]
WHERE = "x.jsonl, row 1"


def chat() -> Chat:
    return Chat.of(Tokenizer.bytes_level())


def record(**fields: Any) -> Record:
    return Record(WHERE, fields)


def encoded(rows: list[Record], seq_len: int, **options: Any) -> Pairs:
    return encode_pairs(sides_of(sort_preferences(rows).pairs), chat(), seq_len, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
        {"prompt": USER, "chosen": [*USER, *GOOD], "rejected": [*USER, *BAD]},
        {"prompt": "q", "chosen": [*USER, *GOOD], "rejected": [*USER, *BAD]},
        {"instruction": "q", "input": "", "output": "a", "rejected": "b"},
        {"instruction": "q", "output": "b", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": [*USER, *GOOD], "rejected": [*USER, *BAD]},
    ],
)
def test_every_format_is_the_same_pair(fields: dict[str, Any]) -> None:
    assert preference_of(record(**fields)) == Pair(WHERE, USER, GOOD, BAD)


def test_more_turns_margins_ties_and_labels() -> None:
    transcript = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: "
    pair = preference_of(record(chosen=transcript + "a", rejected=transcript + "b", margin=0.5, tie=True))
    assert pair == Pair(WHERE, TURNS, GOOD, BAD, 0.5, True)
    labelled = preference_of(record(prompt="q", completion="a", label=True))
    assert labelled == Labelled(WHERE, USER, GOOD, True)
    with_system = preference_of(record(instruction="q", input="i", system="s", output="a", rejected="b"))
    assert isinstance(with_system, Pair)
    assert with_system.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\ni"}]


@pytest.mark.parametrize(
    "rejected",
    [
        "\n\nHuman: other\n\nAssistant: b",
        "\n\nHuman: q\n\nAssistant: c\n\nHuman: r\n\nAssistant: b",
        "\n\nHuman: q\n\nAssistant: b\n\nHuman: thanks",
    ],
)
def test_transcripts_must_share_their_prompt(rejected: str) -> None:
    assert preference_of(record(chosen="\n\nHuman: q\n\nAssistant: a", rejected=rejected)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, "no known format of preferences has the keys text"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label is 'good', not true or false"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is no text and no list of messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is 'much', not a number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}, "margin is -1, not a number of at least 0"),
        ({"prompt": "q", "chosen": USER, "rejected": "b"}, "chosen does not end with an answer"),
        ({"chosen": "plain", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "chosen is no transcript"),
        ({"prompt": [{"from": "poet", "value": "q"}], "chosen": "a", "rejected": "b"}, "a turn is from 'poet'"),
    ],
)
def test_records_that_are_no_preference(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{WHERE}: {message}"):
        preference_of(record(**fields))


def test_what_counts_and_what_is_left_out() -> None:
    """Prompts never count, the end of each answer does; equal and long pairs and ties are counted."""
    rows = [
        record(prompt="q" * 9, chosen="good", rejected="bad one"),
        record(prompt="q", chosen="same", rejected="same"),
        record(prompt="q", chosen="x" * 300, rejected="b"),
        record(prompt="q", chosen="a", rejected="b", tie=True),
        record(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: c\n\nAssistant: d"),
    ]
    assert sort_preferences(rows).other_prompt == 1
    pairs = encoded(rows, 200)
    counts = {"kept": 1, "cut": 0, "too_long": 1, "equal": 1, "tied": 1, "empty": 0}
    assert pairs.counts._asdict() == counts
    assert pairs.counts.left_out == "1 too long, 1 with equal answers, 1 ties"
    tokenizer, examples = chat().tokenizer, pairs.examples
    for side, text in enumerate(("good", "bad one")):
        part = slice(*examples.offsets[side : side + 2])
        counted = examples.ids[part][examples.weights[part] != 0]
        assert tokenizer.decode(counted[:-1].tolist()).strip() == text
        assert int(counted[-1]) in chat().ends
    assert encoded(rows, 200, ties=True).ties.tolist() == [False, True]


def test_answers_within_a_prompt_do_not_count() -> None:
    before = "\n\nHuman: q\n\nAssistant: early\n\nHuman: r\n\nAssistant: "
    examples = encoded([record(chosen=before + "late", rejected=before + "b")], 200).examples
    assert chat().tokenizer.decode(examples.ids[examples.weights != 0].tolist()).count("late") == 1
    assert "early" not in chat().tokenizer.decode(examples.ids[examples.weights != 0].tolist())


def test_long_answers_lose_their_ends() -> None:
    rows = [
        record(prompt="q", chosen="x" * 300, rejected="x" * 400),  # equal once they are cut
        record(prompt="q", chosen="ab", rejected="y" * 300),
        record(prompt="q" * 300, chosen="a", rejected="b"),  # nothing is left of the answers
    ]
    pairs = encoded(rows, 100, truncate=True)
    assert pairs.counts._asdict() == {"kept": 1, "cut": 1, "too_long": 1, "equal": 1, "tied": 0, "empty": 0}
    sizes = np.diff(pairs.examples.offsets) - 1
    assert sizes.sum() == 100 and sizes[0] < sizes[1], "the shorter answer is whole"
    first = pairs.examples.ids[: sizes[0] + 1]
    assert int(first[-1]) in chat().ends


def test_labelled_answers_go_with_a_mismatched_one() -> None:
    rows = [record(prompt=f"q{i}", completion=f"answer {i}", label=i % 2 == 0) for i in range(4)]
    rows.insert(2, record(prompt="q1", completion="answer one", label=False))
    pairs = encode_pairs(labelled_pairs(sort_preferences(rows)), chat(), 200)
    assert pairs.labels.tolist() == [1, -1, -1, 1, -1]
    texts = [
        chat().tokenizer.decode(pairs.examples.ids[slice(*pairs.examples.offsets[k : k + 2])].tolist())
        for k in range(10)
    ]
    for k, (own, other) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        assert rows[k].fields["prompt"] in own and rows[k].fields["prompt"] in other
        assert rows[k].fields["completion"] in own
    assert "answer 0" in texts[3] and "answer 0" in texts[5], "the one before has the same prompt"
    with pytest.raises(UserError, match="KTO needs answers that are wanted"):
        labelled_pairs(sort_preferences([rows[0], rows[3]]))
    with pytest.raises(UserError, match="answers to more than one prompt"):
        labelled_pairs(sort_preferences(rows[1:3]))


def test_a_pair_is_two_labelled_answers() -> None:
    rows = [record(prompt=f"q{i}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(3)]
    sides = labelled_pairs(sort_preferences(rows))
    assert [one.label for one in sides] == [1, -1] * 3
    assert [one.second[-1]["content"] for one in sides] == ["good 2", "bad 2", "good 0", "bad 0", "good 1", "bad 1"]


def test_both_answers_of_a_record_are_in_one_row() -> None:
    """Of KTO, so that what makes any answer likelier cancels in its gradient; where they do not fit, they lie apart."""
    rows = [
        Record(f"x, row {i}", {"prompt": f"q{i}", "chosen": "g" * i, "rejected": "b" * (20 - i)}) for i in range(20)
    ]
    rows = [Record("x, row 20", {"prompt": "q", "chosen": "g" * 40, "rejected": "b" * 39}), *rows[1:]]
    pairs = encode_pairs(labelled_pairs(sort_preferences(rows)), chat(), 160)
    assert len(pairs) == 40 and pairs.units.tolist() == [k // 2 for k in range(40)]
    for most, whole in ((8, True), (3, True), (1, False)):
        laid = PairRows(pairs, 160, seed=1, most=most)
        for epoch in range(3):
            members = [row.tolist() for row in laid.plan(epoch)]
            assert len(members) == laid.rows_per_epoch and max(map(len, members)) <= most
            assert sorted(pair for row in members for pair in row) == list(range(40))
            together = [pair ^ 1 in row for row in members for pair in row if pair > 1]
            assert all(together) if whole else not any(together)
    assert dataclasses.replace(pairs, units=np.arange(40, dtype=np.int32)).fingerprint != pairs.fingerprint


def test_a_prompt_is_in_one_part() -> None:
    rows = [record(prompt=f"q{i // 2}", chosen=f"good {i}", rejected=f"bad {i}") for i in range(200)]
    parts = split(sort_preferences(rows), 0.3)
    prompts = [{pair.prompt[0]["content"] for pair in part.pairs} for part in parts]
    assert not prompts[0] & prompts[1] and sum(map(len, prompts)) == 100 and 15 < len(prompts[1]) < 45
    assert sum(len(part.pairs) for part in parts) == 200


def test_rows_hold_whole_pairs_side_by_side() -> None:
    rng = np.random.default_rng(0)
    words = [("a" * int(rng.integers(1, 20)), "b" * int(rng.integers(1, 20))) for _ in range(30)]
    source = [record(prompt="q", chosen=a, rejected=b, margin=float(i)) for i, (a, b) in enumerate(words)]
    rows = PairRows(encoded(source, 192), 192, seed=3, pad=chat().tokenizer.pad, most=5)
    batch = rows[np.arange(rows.rows_per_epoch)]
    assert batch["tokens"].shape == (rows.rows_per_epoch, 192) and batch["margins"].shape[1] == 5
    seen = []
    for row in range(rows.rows_per_epoch):
        for place in range(5):
            sides = [batch["segments"][row] == 2 * place + side + 1 for side in (0, 1)]
            if not sides[0].any():
                continue
            spans = [np.flatnonzero(side) for side in sides]
            assert spans[1][0] == spans[0][-1] + 1
            for span, text in zip(spans, words[int(batch["margins"][row, place])], strict=True):
                assert batch["positions"][row, span].tolist() == list(range(len(span)))
                assert np.array_equal(batch["tokens"][row, span[1:]], batch["targets"][row, span[:-1]])
                counted = batch["targets"][row, span][batch["weights"][row, span] > 0][:-1]
                assert chat().tokenizer.decode(counted.tolist()).strip() == text
            seen.append(batch["margins"][row, place])
    assert sorted(seen) == list(range(30))
    again = rows[np.arange(2 * rows.rows_per_epoch)]
    assert not np.array_equal(again["tokens"][rows.rows_per_epoch :], batch["tokens"])
    assert sorted(again["margins"][rows.rows_per_epoch :].ravel()) == sorted(batch["margins"].ravel())
    size = rows.rows_per_epoch + 1
    (whole,) = rows.once(size, np.arange(size))
    assert whole["segments"][:-1].any(1).all() and not whole["segments"][-1].any()


def source_of(folder: Path, rows: list[dict[str, Any]], labelled: bool = False, **options: Any) -> PreferenceSource:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(path), "seq_len": 128, "validation_fraction": 0.3} | options
    return PreferenceSource.open(
        toml.from_dict({"tokenizer": {"kind": "bytes"}, "data": data}), None, labelled=labelled
    )


def test_the_source_of_a_stage(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    source = source_of(tmp_path, rows)
    whole, share = (source.batches(batch_size=4, rows=part) for part in (None, np.array([1, 2])))
    for batches in (whole, share):
        batches.set_state({"next_index": 7})
    assert np.array_equal(next(whole)["tokens"][1:3], next(share)["tokens"])
    (held_out,) = source.held_out(batch_size=4, rows=None, max_batches=0)
    pairs = sum(int((batch["segments"].max(1) // 2).sum()) for batch in held_out.batches())
    assert len(source.train) + pairs == 40 and pairs > 5
    kto = source_of(tmp_path, rows, labelled=True)
    assert len(kto.train) == 2 * len(source.train)
    batches = list(kto.held_out(batch_size=4, rows=None, max_batches=0)[0].batches())
    judged = [int((batch["labels"] != 0).sum()) for batch in batches]
    assert sum(judged) == 2 * pairs and judged[-1] == 0, "labelled answers, then the pairs themselves"
    assert kto.identity() != source.identity()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "q", "chosen": "a", "rejected": "a"}],
            r"\.jsonl: no pair is left to train on: 1 with equal answers",
        ),
        ([{"prompt": "q", "chosen": "a" * 500, "rejected": "a"}], "no pair is left to train on: 1 too long"),
        ([{"chosen": [*USER, *GOOD], "rejected": [*TURNS, *BAD]}], "1 whose sides are not answers to one prompt"),
        ([{"prompt": "q", "completion": "a", "label": True}], "row 1: an answer with a label is no pair"),
        ([], "no pair is left to train on: there is none"),
    ],
)
def test_nothing_to_train_on(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source_of(tmp_path, rows, validation_fraction=0.0)


def test_pairs_that_are_held_out_and_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    other = tmp_path / "held out.jsonl"
    other.write_text(
        "".join(json.dumps(row | {"chosen": row["chosen"] + "!" * (i < 7)}) + "\n" for i, row in enumerate(rows))
    )
    source_of(tmp_path, rows, validation_source=str(other))
    assert [record.getMessage() for record in caplog.records] == [
        "warning: data.validation_source: 3 of 10 validation preferences are training preferences to the letter: a "
        "loss on them shows memory; take them out, or name another data.validation_source"
    ]


def test_the_files_of_the_project() -> None:
    """All of them are read; of the HH transcripts, few have sides that are not answers to one prompt."""
    folder = DATA / "preference_small"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: JAXLM_DATA names the folder of the data")
    small = read_preferences(str(folder / "instruction_preference_1100.jsonl"))
    kept = encode_pairs(sides_of(small.pairs[:300]), chat(), 1024).counts
    assert len(small.pairs) == 1100 and kept.kept + kept.equal == 300
    demo = read_preferences(str(folder / "dpo_en_demo_300.jsonl"))
    assert len(demo.pairs) == 300 and all(pair.prompt[-1]["role"] == "user" for pair in demo.pairs)
    for name, other in (("train", 5), ("helpful_base_eval", 5)):
        hh = read_preferences(str(DATA / "hh_rlhf" / f"{name}.jsonl.gz"))
        assert hh.other_prompt == other and len(hh.pairs) > 1500
