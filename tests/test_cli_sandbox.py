"""`jaxlm sandbox` and `jaxlm eval --from`: what they print, and one line for each mistake."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path

import pytest

from jaxlm.cli import main
from jaxlm.errors import UserError
from jaxlm.sandbox import choose
from jaxlm.sandbox.battery import escapes


@pytest.fixture(autouse=True, scope="module")
def isolation() -> None:
    try:
        choose()
    except UserError as error:
        pytest.skip(f"nothing isolates code here: {error}")


def called(monkeypatch: pytest.MonkeyPatch, *words: str, stdin: bytes = b"") -> int:
    monkeypatch.setattr(sys, "argv", ["jaxlm", *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    return main()


def test_the_table_of_escapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = [escape for escape in escapes.battery() if escape.name in {"file/secret.py", "cheat/equals_all.py"}]
    monkeypatch.setattr(escapes, "battery", lambda quick=False: few)
    assert called(monkeypatch, "sandbox") == 0
    shown = capsys.readouterr().out
    assert "0 of 2 escapes and cheats succeed" in shown and "isolates nothing" in shown
    assert called(monkeypatch, "sandbox", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["tried"], record["escaped"]) == (2, []) and record["backends"][record["sandbox"]] == "holds"
    monkeypatch.setattr(escapes, "attempt", lambda escape, *rest: escapes.Tried(escape, True, "seen"))
    assert called(monkeypatch, "sandbox") == 1 and "ESCAPED" in capsys.readouterr().out
    assert called(monkeypatch, "sandbox", "--sandbox", "none") == 2


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    file = tmp_path / "double.sh"
    file.write_text("read x; echo $((2 * x)); exit 3")
    assert called(monkeypatch, "sandbox", "run", str(file), stdin=b"21\n") == 3
    assert capfdbinary.readouterr().out == b"42\n"
    loop = tmp_path / "loop.py"
    loop.write_text("while True: pass")
    assert called(monkeypatch, "sandbox", "run", str(loop), "--cpu-seconds", "0.5") == 1
    assert b"cpu_time" in capfdbinary.readouterr().err
    assert called(monkeypatch, "sandbox", "run", str(tmp_path / "nothing.py")) == 2
    assert called(monkeypatch, "sandbox", "run", str(loop), "--memory", "12") == 2
    assert b"at least 64M" in capfdbinary.readouterr().err


def test_eval_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"task_id": "Own/0", "prompt": "def one():\n", "entry_point": "one", "canonical_solution": "    return 1\n"}
    row["test"] = "def check(candidate):\n    assert candidate() == 1\n"
    data, samples = tmp_path / "own.jsonl.gz", tmp_path / "samples.jsonl"
    data.write_bytes(gzip.compress(json.dumps(row).encode()))
    texts = ["    return 1\n", "    return 2\n"]
    samples.write_text("".join(json.dumps({"task_id": "Own/0", "completion": text}) + "\n" for text in texts))
    words = ["eval", "--from", str(samples), "humaneval", "--data", str(data), "--k", "1,2"]
    assert called(monkeypatch, *words, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["task"], record["n"], record["passed"]) == ("humaneval", 2, 1)
    assert record["verdicts"] == {"passed": 1, "failed": 1} and record["raw"]["pass@2"]["value"] == 1
    assert len((tmp_path / "samples.verdicts.jsonl").read_text().splitlines()) == 2
    assert called(monkeypatch, *words, "--sandbox", "none", "--out", str(tmp_path / "bare.jsonl")) == 0
    assert {"NOT", "ISOLATED"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "x.jsonl"], "Missing argument"),
        (["--from", "x.jsonl", "humaneval", "mbpp"], "--from judges one task, not 2"),
        (["--from", "x.jsonl", "humaneval", "--k", "a"], "--k a is no list of numbers"),
        (["--from", "x.jsonl", "humaneval", "--k", "0,1"], "--k 0 is no number of samples"),
        (["some/run", "humaneval", "--k", "0"], "--k 0 is no number of samples"),
        (["--from", "x.jsonl", "humanevl"], "did you mean 'humaneval'"),
        (["some/run", "humaneval", "--samples", "0"], "makes no sample"),
        (["some/run", "humaneval", "--samples", "5"], "temperature 0 makes 5 equal samples"),
        (["some/run", "humaneval", "--samples", "5", "--temperature", "0.2", "--k", "10"], "pass@10 needs at least 10"),
        (["some/run"], "no task is named"),
        (["some/run", "humaneval", "--language", "perl"], "No such option: --language"),
        (["some/run", "humaneval", "--sandbox", "bwarp"], "no sandbox 'bwarp'"),
    ],
)
def test_mistakes(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "eval", *words) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.splitlines()) == 1
