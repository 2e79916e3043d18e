"""Hosts that ssh reaches. Here ssh is a program that runs the command on this machine, by the same shell and pipes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.launch.ssh import Remote, command_line, launch_remotely, read_hosts

HERE = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
exec sh -c "$2"
"""
# What runs on a host: says who it is, waits until it is told to stop (or not), leaves with code 75.
TOLD_TO_STOP = """#!/bin/sh
echo "$JAXLM_PROCESS_ID of $JAXLM_PROCESSES at $JAXLM_COORDINATOR in $(pwd): $*"
trap 'echo saved; touch "$0.$JAXLM_PROCESS_ID.saved"; exit 75' TERM
touch "$0.$JAXLM_PROCESS_ID.runs"
for _ in $(seq 600); do sleep 0.1; done
"""
FAILS = """#!/bin/sh
if [ "$JAXLM_PROCESS_ID" = 1 ]; then
    for _ in $(seq 600); do [ -e "$0.runs" ] && break; sleep 0.1; done
    exit 3
fi
trap 'touch "$0.saved"; exit 75' TERM
touch "$0.runs"
for _ in $(seq 600); do sleep 0.1; done
"""


def remote(folder: Path, there: str, hosts: str = "a\nuser@b.example\n") -> Remote:
    """Hosts whose interpreter is the script `there`."""
    for name, text in {"ssh": HERE, "python": there, "hosts": hosts}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return Remote(folder / "hosts", python=str(folder / "python"), ssh=str(folder / "ssh"), grace=20)


def started(one: Remote, logs: Path, *words: str) -> subprocess.Popen[str]:
    """`jaxlm launch ssh` as a process."""
    options = [f"--python={one.python}", f"--ssh={one.ssh}", f"--logs={logs}", "--grace=20", "--folder=/"]
    command = [sys.executable, "-m", "jaxlm", "launch", "ssh", str(one.hosts), *options, "--", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, paths
        time.sleep(0.05)


def test_a_stop_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    one = remote(tmp_path, TOLD_TO_STOP)
    process = started(one, tmp_path / "logs", "train", "a b.toml")
    until(tmp_path / "python.0.runs", tmp_path / "python.1.runs")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    lines = sorted(printed.splitlines())
    assert lines[0].startswith("[0] 0 of 2 at a:") and lines[0].endswith(" in /: -m jaxlm train a b.toml --resume")
    assert lines[1] == "[0] saved" and lines[3] == "[1] saved"
    assert (tmp_path / "logs" / "process-1.log").read_text().endswith("saved\n")


def test_what_runs_on_a_host_ends_with_its_connection(tmp_path: Path) -> None:
    one = remote(tmp_path, TOLD_TO_STOP, "a\n")
    process = subprocess.Popen([one.ssh, "a", command_line(one, ["a"], 0, ["train"], {})], stdin=subprocess.PIPE)
    until(tmp_path / "python..runs")
    process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert process.wait(60) == 75
    assert (tmp_path / "python..saved").exists()


def test_the_others_are_stopped_when_one_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = remote(tmp_path, FAILS)
    assert launch_remotely(one, ["train"], restarts=0, logs=tmp_path / "logs") == 3
    assert "process 1 ended with exit code 3" in capfd.readouterr().err
    assert (tmp_path / "python.saved").exists()


def test_processes_of_one_host_take_a_device_each() -> None:
    hosts, one = ["a", "b", "b"], Remote(Path("hosts"), folder="/x")
    lines = [command_line(one, hosts, index, ["train"], {"JAXLM_COORDINATOR": "127.0.0.1:77"}) for index in range(3)]
    assert all("JAXLM_COORDINATOR=a:77 JAXLM_PROCESSES=3" in line and "JAXLM_HOSTS=2" in line for line in lines)
    assert ["JAX_LOCAL_DEVICE_IDS=" in line for line in lines] == [False, True, True]
    assert "JAX_LOCAL_DEVICE_IDS=1" in lines[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no hosts"), ("# none\n", "no hosts"), ("-oProxyCommand=x\n", "the host"), ("a; touch pwned\n", "the host")],
)
def test_hosts_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hosts(tmp_path / "hosts")
    with pytest.raises(UserError, match="No such file"):
        read_hosts(tmp_path / "none")
