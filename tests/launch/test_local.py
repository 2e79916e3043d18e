"""`jaxlm launch local`: what it does with its processes, whatever they are."""

import io
import re
import signal
import sys
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.launch import local
from jaxlm.launch.local import launch

WORDS = ("preflight",)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function from Python code to the logs folder; `launch` runs the code, which has `me` and `words`."""
    monkeypatch.setattr(local, "FIRST_PAUSE", 0.01)

    def set_code(code: str) -> Path:
        head = 'import os, signal, sys, time\nfrom pathlib import Path\nme = int(os.environ["JAXLM_PROCESS_ID"])\n'
        (tmp_path / "child.py").write_text(head + "words = sys.argv[1:]\n" + code)
        monkeypatch.setattr(local, "PROGRAM", (sys.executable, "-S", str(tmp_path / "child.py")))
        return tmp_path / "logs"

    return set_code


def test_output_is_prefixed_and_collected(script, capfd, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_enable_fast_math=false")
    logs = script('print(words, me, os.environ["JAXLM_PROCESSES"], os.environ["XLA_FLAGS"])')
    assert launch(WORDS, processes=2, devices=3, logs=logs) == 0
    shown = sorted(capfd.readouterr().out.splitlines())
    flags = "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=3"
    assert shown == [f"[{i}] ['preflight'] {i} 2 {flags}" for i in range(2)]
    assert [(logs / f"process-{i}.log").read_text() for i in range(2)] == [line[4:] + "\n" for line in shown]


class FullDisk(io.StringIO):
    """A standard output that takes a few lines."""

    def write(self, text: str) -> int:
        if self.tell() > 20:
            raise UserError("standard output: No space left on device", "make room, or send it elsewhere")
        return super().write(text)


def test_output_on_a_full_disk_ends_in_the_main_thread(script, capfd, monkeypatch):
    """The processes go on, and so do their logs; a failure of theirs goes first."""
    logs = script("for n in range(1000): print(n, flush=True)\nsys.exit(len(words) - 1)")
    monkeypatch.setattr(sys, "stdout", FullDisk())
    with pytest.raises(UserError, match="standard output: No space left on device"):
        launch(WORDS, processes=2, logs=logs)
    assert [(logs / f"process-{i}.log").read_text().split() for i in range(2)] == [[*map(str, range(1000))]] * 2
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert launch([*WORDS] * 4, processes=2, logs=logs) == 3
    assert re.search("^launch: standard output: No space left .*\nlaunch: process . ended with", capfd.readouterr().err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_on_a_full_disk(script, capfd, monkeypatch):
    logs, open_ = script("for n in range(1000): print(n, flush=True)"), Path.open
    full = lambda path, *how, **more: open_(Path("/dev/full") if path.suffix == ".log" else path, *how, **more)  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="/dev/full: No space left on device"):
        launch(WORDS, processes=2, logs=logs)
    shown = capfd.readouterr().out.splitlines()
    assert sorted(shown) == sorted(f"[{i}] {n}" for i in range(2) for n in range(1000))


def test_all_processes_get_one_free_address(script, capfd):
    logs = script('print(os.environ["JAXLM_COORDINATOR"])')
    assert launch(WORDS, processes=3, logs=logs) == 0
    (address,) = {line[4:] for line in capfd.readouterr().out.splitlines()}
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)


def test_half_lines_of_gloo_stay_in_the_log(script, capfd):
    """Seen: two threads that connect at once, between whose pieces the other's may fall."""
    whole = "[Gloo] Rank 1 is connected to 2 peer ranks. Expected number of connected peer ranks is : 2"
    halves = ["[Gloo] Rank [Gloo] Rank 10 is connected to ", "2", " is connected to 2 peer ranks. ", "2 peer ranks. 2"]
    told = ["step 1/3", "2 peer ranks are behind", "[Gloo] Rank 1 lost", "silent tasks:", "1"]
    logs = script(f'if me == 0: print("""{chr(10).join([whole, *halves, *told])}""")')
    assert launch(WORDS, processes=2, logs=logs) == 0
    assert capfd.readouterr().out.splitlines() == [f"[0] {line}" for line in told]
    assert (logs / "process-0.log").read_text().splitlines() == [whole, *halves, *told]


@pytest.mark.parametrize(("end", "code", "how"), [("sys.exit(3)", 3, "ended with exit code 3"), ("", 137, "SIGKILL")])
def test_the_first_failure_is_told_and_the_others_are_stopped(script, capfd, end, code, how):
    end = end or "os.kill(os.getpid(), signal.SIGKILL)"
    logs = script(
        f"""
if me == 1:
    print("out of memory", flush=True); time.sleep(0.5); {end}
if me == 2:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
    )
    assert launch(WORDS, processes=3, grace=0.2, logs=logs) == code
    told = capfd.readouterr().err
    assert re.search(rf"launch: process 1 .*{how}.*\n    out of memory\n  logs: {logs}\n", told)
    assert "process 0" not in told and "process 2" not in told


def test_the_cause_is_the_first_to_end_whoever_is_heard_first(script, capfd):
    """What a process has started may hold its output open; the others see the connection break and end meanwhile."""
    logs = script(
        """
mark = Path(__file__).with_suffix(".mark")
if me == 1:
    print("hung", flush=True)
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "1")
    mark.touch()
    os._exit(124)
while not mark.exists():
    time.sleep(0.01)
time.sleep(0.2)
sys.exit(1)
"""
    )
    assert launch(WORDS, processes=2, logs=logs) == 124
    assert re.search("process 1 ended with exit code 124 .*\n    hung\n", capfd.readouterr().err)


FAIL_UNTIL = """
tries = Path(__file__).with_suffix(f".{me}")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
print(len(tries.read_text()), *words, flush=True)
if len(tries.read_text()) < %d and me == 0:
    sys.exit(%d)
"""


@pytest.mark.parametrize(
    ("failures", "exit_code", "restarts", "expected"),
    [(2, 5, 3, 0), (9, 5, 2, 5), (2, 2, 3, 2), (2, 75, 1, 75), (1, 75, 1, 0)],
)
def test_restarts_are_bounded_and_resume(script, tmp_path, capfd, failures, exit_code, restarts, expected):
    (tmp_path / "run.toml").write_text("")
    words = ("train", str(tmp_path / "run.toml"), f"out_dir={tmp_path / 'run'}")
    script(FAIL_UNTIL % (failures + 1, exit_code))
    assert launch(words, processes=2, grace=5.0, restarts=restarts) == expected
    attempts = 1 if exit_code == 2 else min(failures, restarts) + 1
    log = (tmp_path / "run" / "logs" / "process-0.log").read_text().splitlines()
    assert log == [f"{n + 1} {' '.join(words)}{' --resume' if n else ''}" for n in range(attempts)]
    assert capfd.readouterr().err.count("launch: restart") == attempts - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_nothing_is_started_again(script, capfd, number):
    logs = script(
        f"""
def leave(number, _):
    print("saved after", number, flush=True)
    sys.exit(75)
signal.signal({int(number)}, leave)
if me == 1:
    time.sleep(0.5)
    os.kill(os.getppid(), {int(number)})
time.sleep(60)
"""
    )
    assert launch(WORDS, processes=2, restarts=3, logs=logs) == 75
    assert sorted(capfd.readouterr().out.splitlines()) == [f"[{i}] saved after {int(number)}" for i in range(2)]


def test_logs_lie_in_the_run(tmp_path, script):
    (tmp_path / "run.toml").write_text("[train]\nsteps = 1\n")
    words = ["train", str(tmp_path / "run.toml"), "train.steps=2", f"out_dir={tmp_path / 'here'}", "--resume"]
    script("")
    assert launch(words, processes=2) == 0
    assert {path.name for path in (tmp_path / "here" / "logs").iterdir()} == {"process-0.log", "process-1.log"}
    with pytest.raises(UserError, match=r"unknown key .train\.stpes."):
        launch(["train", str(tmp_path / "run.toml"), "train.stpes=2"], processes=2)
    with pytest.raises(UserError, match="nothing to launch"):
        launch([], processes=2)
