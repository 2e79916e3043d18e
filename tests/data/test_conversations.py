"""Records of many formats as conversations, and conversations as packed rows."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.data.turns.formats import conversations
from jaxlm.data.turns.rows import ConversationRows, Examples, collect, split
from jaxlm.errors import UserError
from jaxlm.text.chat import Chat, Example, encode
from jaxlm.text.tokenizer import Tokenizer

SHARED = Path(os.environ.get("JAXLM_DATA", Path(__file__).parents[3] / "shared" / "data"))


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["q", "a"]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["q", "a"]),
        ({"instruction": "i", "input": "x", "output": "a"}, ["i\n\nx", "a"]),
        ({"instruction": "i", "output": "a"}, ["i", "a"]),
        ({"prompt": "q", "completion": "a"}, ["q", "a"]),
        ({"question": "q", "equation": "x=1", "answer": 1.0}, ["q\nEquation:", " x=1"]),
        ({"question": "q", "answer": "a"}, ["q", "a"]),
        ({"Body": "b.", "Question": "q?", "Equation": "( 1 )", "Answer": 1}, ["b. q?\nEquation:", " ( 1 )"]),
        ({"label": "1", "sentence": "good "}, ["Review: good\nSentiment:", " positive"]),
        ({"dialogue": "A: hi", "summary": "s"}, ["Summarize this dialogue.\n\nA: hi", "s"]),
        ({"nl": "list", "cmd": "ls"}, ["list", "ls"]),
        ({"text": "a"}, ["a"]),
    ],
)
def test_the_keys_choose_the_format(row: dict[str, Any], wanted: list[str], tmp_path: Path) -> None:
    (found,) = conversations(lines(tmp_path / "a.jsonl", row))
    assert [message["content"] for message in found.messages] == wanted


def test_each_kind_of_file(tmp_path: Path) -> None:
    row = {"prompt": "what, then?", "completion": "so\nit is"}
    (tmp_path / "a.csv").write_text('\ufeffprompt;completion\r\n"what, then?";"so\nit is"\r\n', newline="")
    (tmp_path / "b.tsv").write_text('prompt\tcompletion\nwhat, then?\tso "it is\n')
    (tmp_path / "c.json").write_text(json.dumps([row]))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": ["what, then?"], "completion": ["so\nit is"]}), tmp_path / "e.parquet"
    )
    found = [one.messages[1]["content"] for one in conversations(str(tmp_path))]
    assert found == ["so\nit is", 'so "it is', "so\nit is", "so\nit is", "so\nit is"]


def test_fields_are_renamed_and_a_system_message_is_put_first(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", {"Frage": "q", "Antwort": "a"})
    (found,) = conversations(source, fields={"prompt": "Frage", "completion": "Antwort"}, system="Be brief.")
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "Be brief."),
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"frage": "q"}, {}, "row 1: no known format has the keys frage"),
        ({"frage": "q"}, {"format": "alpaka"}, "no such format.*alpaca"),
        ({"frage": "q"}, {"format": "alpaca"}, "no 'instruction', which the format alpaca needs"),
        ({"frage": "q"}, {"fields": {"prompt": "fraage"}}, r"no 'fraage' \(sft.fields\).*frage"),
        ({"label": "7", "sentence": "x"}, {}, "row 1: label is '7', not 0 or 1"),
        ({"conversations": [{"from": "bob", "value": "x"}]}, {}, "from 'bob'"),
        ({"messages": "hello"}, {}, "messages is text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "parts that are no text"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            {},
            "arguments of the call f are not JSON",
        ),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list(conversations(lines(tmp_path / "a.jsonl", row), **options))
    assert "\n" not in str(caught.value)


def test_empty_rows_of_a_spreadsheet_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "sheet.csv"
    file.write_text("prompt;completion\r\n\r\na;b\r\n;\r\n;;\r\nc;d\r\n", newline="")
    assert [(one.where[-5:], one.messages[1]["content"]) for one in conversations(str(file))] == [
        ("row 3", "b"),
        ("row 6", "d"),
    ]
    file.write_text("prompt;completion\r\n\r\na;b;c\r\n", newline="")
    with pytest.raises(UserError, match=r"sheet.csv, row 3: 3 fields, the header has 2"):
        list(conversations(str(file)))


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"a.jsonl, row 2: not JSON"):
        list(conversations(str(tmp_path / "a.jsonl")))
    (tmp_path / "b.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    with pytest.raises(UserError, match=r"b.csv, row 3: 3 fields, the header has 2"):
        list(conversations(str(tmp_path / "b.csv")))
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(UserError, match=r"c.txt: not a table"):
        list(conversations(str(tmp_path / "c.txt")))
    with pytest.raises(UserError, match="no such file or folder"):
        list(conversations(str(tmp_path / "none.jsonl")))


def made(sizes: list[int], seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    return [Example(random.integers(0, 250, n).astype(np.int32), np.ones(n, np.float32)) for n in sizes]


def rows_of(examples: Examples, seq_len: int = 16, **options: Any) -> ConversationRows:
    return ConversationRows(examples, seq_len, pad=255, **options)


def test_whole_examples_once_an_epoch_with_their_own_targets() -> None:
    given = made([3, 5, 9, 17, 2, 8, 8, 4, 6, 12])
    rows = rows_of(collect(given, 16, "drop"), seed=3)
    for epoch in range(2):
        first = epoch * rows.rows_per_epoch
        packed = rows[np.arange(first, first + rows.rows_per_epoch)]
        seen = []
        for row in range(rows.rows_per_epoch):
            for segment in range(1, packed["segments"][row].max() + 1):
                here = packed["segments"][row] == segment
                assert packed["positions"][row][here].tolist() == list(range(here.sum()))
                tokens, targets = packed["tokens"][row][here], packed["targets"][row][here]
                assert tokens[1:].tolist() == targets[:-1].tolist()
                assert (packed["weights"][row][here] == 1).all()
                seen.append((*tokens.tolist(), int(targets[-1])))
            empty = packed["segments"][row] == 0
            assert (packed["weights"][row][empty] == 0).all() and (packed["tokens"][row][empty] == 255).all()
        assert sorted(seen) == sorted(tuple(one.ids.tolist()) for one in given)


def test_rows_are_a_function_of_seed_epoch_and_number() -> None:
    examples = collect(made([3, 5, 9, 17, 2, 8, 8, 4, 6, 12]), 16, "drop")
    rows, again = rows_of(examples, seed=1), rows_of(examples, seed=1)
    count = rows.rows_per_epoch
    backwards = [again[np.array([i])] for i in reversed(range(3 * count))][::-1]
    for i, one in enumerate(backwards):
        for a, b in zip(rows[np.array([i])].values(), one.values(), strict=True):
            assert np.array_equal(a, b)
    other = rows_of(examples, seed=2)
    assert not np.array_equal(rows[np.arange(count)]["tokens"], other[np.arange(count)]["tokens"])
    assert not np.array_equal(rows[np.arange(count)]["tokens"], rows[np.arange(count, 2 * count)]["tokens"])


def test_each_epoch_has_as_many_rows() -> None:
    sizes = np.random.default_rng(0).integers(2, 17, 300).tolist()
    rows = rows_of(collect(made(sizes), 16, "drop"))
    assert {len(rows.plan(epoch)) for epoch in range(8)} == {rows.rows_per_epoch}
    assert rows.padding < 0.05


def test_one_example_a_row() -> None:
    rows = rows_of(collect(made([3, 5, 9]), 16, "drop"), pack=False)
    assert rows.rows_per_epoch == 3 and (rows[np.arange(3)]["segments"].max(axis=1) == 1).all()


def test_what_is_too_long_is_dropped_or_loses_its_end() -> None:
    given = made([5, 40, 20])
    assert collect(given, 16, "drop").counts == (1, 0, 2, 0)
    cut = collect(given, 16, "truncate")
    assert cut.counts == (3, 2, 0, 0) and np.diff(cut.offsets).tolist() == [5, 17, 17]
    assert cut.ids[-1] == given[2].ids[16]  # no false end


def test_an_example_without_a_trained_token_never_reaches_a_step() -> None:
    silent = Example(np.arange(5, dtype=np.int32), np.array([1, 0, 0, 0, 0], np.float32))  # its first is no target
    late = Example(np.arange(30, dtype=np.int32), np.array([0] * 20 + [1] * 10, np.float32))
    found = collect([*made([4]), silent, late], 16, "truncate")
    assert found.counts == (1, 1 - 1, 0, 2)
    with pytest.raises(UserError, match=r"no example is left.*1 are longer than data.seq_len = 16, 1 have no trained"):
        collect([silent, late], 16, "drop")


def test_the_split_depends_on_the_example_alone() -> None:
    given = made([5] * 60)
    train, held = split(collect(given, 16, "drop"), 0.3)
    again, _ = split(collect(given[::-1], 16, "drop"), 0.3)
    assert 0 < len(held) < 60 and len(train) + len(held) == 60
    assert sorted(train.ids.reshape(-1, 5).tolist()) == sorted(again.ids.reshape(-1, 5).tolist())


def test_little_is_lost_to_padding_on_real_instructions() -> None:
    path = SHARED / "instruct" / "instruction_data_1100.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not in JAXLM_DATA")
    gpt2 = SHARED / "tokenizers" / "gpt2" / "tokenizer.json"
    chat = Chat.of(Tokenizer.from_file(gpt2), "alpaca")
    examples = collect((encode(chat, one.messages) for one in conversations(str(path))), 512, "drop")
    assert examples.counts.kept == 1100
    assert rows_of(examples, 512).padding < 0.05
