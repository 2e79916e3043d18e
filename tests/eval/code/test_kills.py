"""A killed evaluation goes on where it was and ends with the same file; Ctrl-C ends it at once and leaves nothing."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxlm.sandbox import Sandbox
from jaxlm.sandbox.inside import processes

TESTS = "def check(candidate):\n    assert candidate(2.5) == 2\n    assert candidate(-0.5) == -1\n"
ROW = {"prompt": "from math import floor\n\n\ndef down(x):\n", "entry_point": "down", "test": TESTS}
BODIES = ("return floor(x)", "return int(x)", "return", "raise KeyError", "return object()")
TEXTS = [f"    {body}\n" for body in BODIES]


def evaluation(folder: Path, out: Path, problems: int, sandbox: Sandbox) -> subprocess.Popen:
    """Start `jaxlm eval --from` on five different samples of each problem."""
    data, samples = folder / "own.jsonl.gz", folder / "samples.jsonl"
    if not samples.exists():
        rows = [{**ROW, "task_id": f"Own/{n}", "canonical_solution": f"{TEXTS[0]}    # {n}\n"} for n in range(problems)]
        data.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        made = [{"task_id": f"Own/{n}", "completion": text} for n in range(problems) for text in TEXTS]
        samples.write_text("".join(json.dumps(one) + "\n" for one in made))
    words = ["--from", str(samples), "humaneval", "--data", str(data), "--out", str(out), "--sandbox", sandbox.name]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxlm", "eval", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(file: Path, wanted: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while lines(file) < wanted and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_the_same_file_after_kills(kills: int, tmp_path: Path, sandbox: Sandbox) -> None:
    # More than the judge holds at once, so that a kill soon after a line comes before the end.
    problems = 4 + 2 * kills + 2 * (os.cpu_count() or 1)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert evaluation(tmp_path, whole, problems, sandbox).wait() == 0 and lines(whole) == 5 * problems
    chance = random.Random(0)
    for kill in range(kills):
        process = evaluation(tmp_path, killed, problems, sandbox)
        wait_for(killed, 1 + kill * 5 * problems // (kills + 1), process)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.wait()
    assert lines(killed) < 5 * problems  # the last kill came before the end
    assert whole.read_bytes().startswith(killed.read_bytes()[: killed.read_bytes().rfind(b"\n") + 1])
    assert evaluation(tmp_path, killed, problems, sandbox).wait() == 0
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.soak
def test_an_interrupt_leaves_nothing(tmp_path: Path, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]) -> None:
    """Ends by itself, with no box behind it; how long that takes is printed."""
    out = tmp_path / "verdicts.jsonl"
    process = evaluation(tmp_path, out, 400, sandbox)
    wait_for(out, 3, process)
    assert process.poll() is None
    inside = [one.number for one in processes.tree(process.pid)]
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(60)
    with capsys.disabled():
        print(f"\nended {time.monotonic() - began:.2f} s after Ctrl-C")
    assert 0 < lines(out) < 2000 and out.read_bytes().endswith(b"\n")
    assert not list(Path(tempfile.gettempdir()).glob(f"jaxlm-box-{process.pid}-*"))
    # A killed process is gone when its parent, by then the first process of the system, has waited for it.
    end = time.monotonic() + 10
    while [number for number in inside if processes.read_process(number)] and time.monotonic() < end:
        time.sleep(0.01)
    assert len(inside) > 1 and not [number for number in inside if processes.read_process(number)]
