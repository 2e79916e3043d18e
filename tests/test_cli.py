"""The command line from end to end on a tiny corpus: what it prints, where it writes, how it leaves."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from jaxlm.cli import main
from jaxlm.convert.families import FAMILIES
from jaxlm.report.run_page import write_report
from jaxlm.train import loop

CONFIG = """
[model]
d_model = 32
n_layers = 2
n_heads = 2

[tokenizer]
vocab_size = 300

[data]
source = "{corpus}"
cache_dir = "{cache}"
seq_len = 32

[train]
steps = 6
batch_size = 8

[eval]
every = 3

[sample]
prompts = ["def "]
max_new_tokens = 4
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of small functions, a config, and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus").mkdir()
    for i in range(40):
        code = f"def add_{i}(a, b):\n    return a + b + {i}\n\n" * 4
        (folder / "corpus" / f"module_{i}.py").write_text(code)
    (folder / "tiny.toml").write_text(CONFIG.format(corpus=folder / "corpus", cache=folder / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_report", write_report)  # as the fixture `pages` does
        assert run("train", folder / "tiny.toml", f"out_dir={folder / 'run'}") == 0
    return folder


def run(*args: object) -> int:
    """`jaxlm ARGS` in this process; returns the exit code."""
    before, sys.argv = sys.argv, ["jaxlm", *map(str, args)]
    try:
        return main()
    finally:
        sys.argv = before


def test_a_run_is_self_contained(workplace: Path) -> None:
    rows = [json.loads(line) for line in (workplace / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6]
    assert rows[-2]["loss"] < rows[0]["loss"]
    for name in ("config.toml", "tokenizer.json", "checkpoints/6", "plots/loss.png", "report.html"):
        assert (workplace / "run" / name).exists(), name
    assert (workplace / "run" / "samples" / "00000006.txt").read_text().startswith("def ")


def test_generate_prints_json(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", workplace / "run", "def add", "--greedy", "--max-new-tokens", 5, "--json")
    assert run(*args) == 0
    first = json.loads(capsys.readouterr().out)
    assert first.keys() == {"prompt", "text", "tokens", "finish"} and first["prompt"] == "def add"
    assert 1 <= len(first["tokens"]) <= 5
    assert run(*args) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_generate_guesses(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same text by a draft, here the model itself, which is always right, and by what repeats itself."""
    args = ("generate", workplace / "run", "def add", "--max-new-tokens", 12, "--seed", 4)
    assert run(*args) == 0
    alone = capsys.readouterr().out
    for more in ((), ("--draft", workplace / "run")):
        assert run(*args, "--speculate", 5, "--verbose", *more) == 0
        shown = capsys.readouterr()
        assert shown.out == alone
    tokens, guessed, calls, right = map(int, re.findall(r"(\d+) ", shown.err)[:4])
    assert tokens <= 12 and guessed == right > tokens / 2 > calls, shown.err
    assert run(*args, "--draft", workplace / "run") == 2
    assert "speculate = 0" in capsys.readouterr().err


def test_generate_takes_a_message_of_a_chat(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(workplace / "run"), "hi", "--greedy", "--max-new-tokens", "4", "--json"]
    assert run(*command, "--chat") == 0
    assert json.loads(capsys.readouterr().out)["prompt"].endswith("hi<|end|><|assistant|>")


def test_generate_answers_a_file(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bad line has its error; a killed command goes on with nothing twice; another run's output is not touched."""
    lines = [
        {"prompt": "def add", "max_new_tokens": 3},
        {"prompt": "x", "max_new_tokens": 4, "n": 2, "sampling": {"temperature": 0.5}, "logprobs": 0},
        {"prompt": "x", "max_tokens": 4},
        {"prompt": [5, 6], "max_new_tokens": 2, "stop": ["\n"]},
    ]
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [json.dumps(line) for line in lines]
    prompts.write_text("\n".join([*texts[:2], "{broken", *texts[2:]]) + "\n")
    args = ("generate", workplace / "run", "--prompts", prompts, "--out", out, "--rows", 2, "--greedy")
    assert run(*args) == 0
    whole = out.read_text()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 3, 4]
    assert "no JSON" in answers[2]["error"] and "max_new_tokens" in answers[3]["error"]
    assert answers[0]["usage"]["completion"] == len(answers[0]["ids"]) <= 3
    assert len(answers[1]["choices"]) == 2 and len(answers[1]["log_probs"]) == len(answers[1]["ids"])

    out.write_text(whole[: len(whole) // 2])
    assert run(*args) == 0 and out.read_text() == whole
    assert run(*args) == 0 and out.read_text() == whole
    capsys.readouterr()
    assert run(*args, "--seed", 1) == 2 and out.read_text() == whole
    assert "does not answer line 1" in capsys.readouterr().err
    assert run("generate", workplace / "run", "--prompts", prompts) == 2
    assert "--out" in capsys.readouterr().err


def test_generate_streams_the_same_text(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", workplace / "run", "def add", "--greedy", "--max-new-tokens", 12)
    assert run(*args) == 0
    streamed = capsys.readouterr().out
    assert run(*args, "--json") == 0
    assert streamed == "def add" + json.loads(capsys.readouterr().out)["text"] + "\n"


def test_info_counts_a_run_exactly(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", workplace / "run", "--json") == 0
    counted = json.loads(capsys.readouterr().out)
    d, f, v = 32, 128, 300
    layer = 4 * d * d + 3 * d * f + 2 * d
    assert counted["total"] == v * d + 2 * layer + d
    assert counted["embedding"] == v * d
    attention = 2 * 2 * 32 * d
    assert counted["forward_flops"] == 2 * (2 * (4 * d * d + 3 * d * f) + v * d) + attention


def test_info_divides_memory_over_the_mesh(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = []
    for fsdp in (1, 4):
        assert run("info", workplace / "tiny.toml", f"mesh.fsdp={fsdp}", "mesh.data=1", "--json") == 0
        memory.append(json.loads(capsys.readouterr().out)["parameter_bytes"])
    assert memory[0] == 4 * memory[1]


def test_convert_and_open_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated = []
    for to in ("torch", "llama"):
        assert run("convert", workplace / "run", workplace / to, "--to", to) == 0
        capsys.readouterr()
        for source in (workplace / "run", workplace / to):
            assert run("generate", source, "def", "--greedy", "--max-new-tokens", 8, "--json") == 0
            generated.append(json.loads(capsys.readouterr().out)["tokens"])
    assert all(tokens == generated[0] for tokens in generated)


def test_convert_picks_the_family(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", workplace / "run", workplace / "hf", "--to", "hf") == 0
    told = capsys.readouterr()
    assert told.err == "--to hf: llama can hold this model\n" and f"{workplace / 'hf'}: llama, " in told.out
    assert json.loads((workplace / "hf" / "config.json").read_text())["model_type"] == "llama"


def test_convert_lists_the_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "--help") == 0
    shown = set(re.findall(r"\w+", capsys.readouterr().out))
    assert shown >= {"jaxlm", "torch", "hf", *FAMILIES}, FAMILIES.keys() - shown


def test_look_at_the_tokenizer_and_the_data(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tokenizer", "train", workplace / "tiny.toml", workplace / "tokenizer.json") == 0
    assert run("tokenizer", "inspect", workplace / "tokenizer.json", "--text", "def add") == 0
    assert run("data", "prepare", workplace / "tiny.toml") == 0
    assert run("data", "inspect", workplace / "tiny.toml") == 0
    out = capsys.readouterr().out
    assert "300" in out and "return a + b" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("train", "nowhere.toml"), "nowhere.toml: no such config file"),
        (("train", "{}/tiny.toml", "model.d_modle=3"), "unknown key 'model.d_modle' (did you mean 'd_model'?)"),
        (("train", "{}/tiny.toml", "out_dir={}/run"), "a run is already there (continue it with --resume"),
        (("generate", "{}/corpus", "x"), "not a model"),
        (("generate", "{}/run", "x", "--top-p", "2"), "top_p = 2.0"),
        (("generate", "{}/run", "--prompts", "i", "--out", "o", "--verbose"), "--verbose is of one prompt"),
        (("generate", "{}/run", "--prompts", "i", "--out", "o", "--json"), "--json is of one prompt"),
        (("generate", "{}/run", "--prompts", "i", "--out", "o", "--chat"), "--chat is of one prompt"),
        (("generate", "{}/run", "x", "--backend", "torch", "--draft", "{}/run"), "by torch without speculation"),
        (("convert", "{}/run", "{}/out", "--to", "lama"), "did you mean 'llama'?"),
        (("info", "{}/tiny.toml", "train.steps=many"), "train.steps = 'many'"),
    ],
)
def test_a_mistake_is_one_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    assert run(*(arg.replace("{}", str(workplace)) for arg in args)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert run("--help") == 0
    for verb in ("train", "generate", "convert", "parity", "info", "tokenizer", "data"):
        assert run(verb, "--help") == 0
    assert "Exit code 0: the same" in capsys.readouterr().out.replace("\n", " ")


def test_eval_position(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("eval", workplace / "run", "position", "--length", 64, "--window", 8, "--texts", 2, "--buckets", 4)
    assert run(*args, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [variant["name"] for variant in report["variants"]] == ["as trained", "window 8", "window 8, first 4"]
    assert (workplace / "run" / "eval" / "position.json").exists()
    assert run(*args) == 0
    shown = capsys.readouterr().out
    assert "window 8, first 4" in shown and "49 - 64" in shown
    assert run("eval", workplace / "run", "positon") == 2
    assert capsys.readouterr().err == "error: unknown task 'positon' (did you mean 'position'?)\n"
