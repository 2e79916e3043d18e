"""The processes of a run on this machine: started, listened to, stopped together, started again.

jaxlm launch local --processes 4 --devices-per-process 2 -- train configs/quickstart.toml
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from jaxlm.config import toml
from jaxlm.errors import UserError

PROGRAM = (sys.executable, "-m", "jaxlm")
LAST_LINES = 12
USERS_MISTAKE, RESUMABLE = 2, 75
"""Exit codes of `jaxlm train`: 2, starting it again is of no use; 75, it was stopped and goes on with --resume."""
LAST_SAVE, LAST_WORDS = 300.0, 5.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
_NOISE = re.compile(
    r"""^\s+@ |^\*\*\* Check failure stack trace|^\s*$|^(Thread|Current thread) 0x|^  File "[^"]*", line \d+ in """
)
_PIECE = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "
_GLOO = re.compile(rf"^\d*({_PIECE})({_PIECE}|\d)*$")


def without_noise(lines: Iterable[str]) -> Iterator[str]:
    """Without what is kept in the log alone: stacks of C++ and of `train.watch`, and gloo as it connects.

    Its threads write pieces of lines between each other's, so that behind such a line may stand one of digits.
    """
    connecting = False
    for line in lines:
        connecting = bool(_GLOO.search(line)) or (connecting and line.isdigit())
        if not connecting and not _NOISE.search(line):
            yield line


def launch(
    words: Sequence[str],
    *,
    processes: int,
    devices: int = 0,
    restarts: int = 0,
    grace: float = 10.0,
    logs: Path | None = None,
) -> int:
    """Run `jaxlm WORDS` as `processes` processes; returns the exit code, 128 + n where a signal n ended the first.

    Args:
        devices: virtual CPU devices of each process; 0: the accelerator with its number, or the CPU.
        restarts: how often to start again, with `--resume`, after any exit code but 0 and 2, if nobody stopped it.
        grace: seconds from SIGTERM to SIGKILL for the others after one has failed.
        logs: folder of `process-N.log`; None: `logs/` in the run directory, else in the working directory.

    Raises:
        UserError: no verb, or a config that cannot be read. After the run, if no process has failed: standard output or
            a log took no more, because its disk is full and the like.
        OSError: as that UserError, where standard output is not the command line's.
    """
    if not words:
        raise UserError("nothing to launch", "jaxlm launch local --processes 4 -- train CONFIG")
    folder = logs or _log_folder(words)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("process-*.log"):
        old.unlink()
    words, unwritten = list(words), None
    for attempt in range(restarts + 1):
        group = _Group(words, processes, devices, folder)
        failed = group.run(grace)
        unwritten = unwritten or group.unwritten
        if failed is None and unwritten:
            raise unwritten
        if group.unwritten:
            _say(str(group.unwritten))
        if failed is None or group.stopping:
            return failed.exit_code if failed else 0
        _say(f"{failed.describe()}\n  logs: {folder}")
        if failed.exit_code == USERS_MISTAKE or attempt == restarts:
            break
        pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
        _say(f"restart {attempt + 1} of {restarts} in {pause:g} s")
        time.sleep(pause)
        words += ["--resume"] if words[0] == "train" and "--resume" not in words else []
    return failed.exit_code


class _Process:
    """One child: its output goes to its log and, line by line with its number in front, to ours."""

    def __init__(self, index: int, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.index, self.last = index, deque[str](maxlen=LAST_LINES)
        self.popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal reaches the launcher alone, which passes it on
        )
        self.begun = self.ended = time.monotonic()
        self.unwritten: OSError | UserError | None = None
        """The first error of standard output or of the log. The output is read on, or the process would end by it."""
        self._log = log.open("ab", buffering=0)
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def follow(self, ended: queue.Queue[_Process]) -> None:
        """Copy the output from now on, and say at once when the process has ended: the first one is the cause."""

        def wait() -> None:
            self.popen.wait()
            self.ended = time.monotonic()
            ended.put(self)

        threading.Thread(target=wait, daemon=True).start()
        self._listener.start()

    def _listen(self) -> None:
        output: IO[bytes] = self.popen.stdout  # pyright: ignore[reportAssignmentType]
        with self._log, output:
            for text in without_noise(self._logged(output)):
                self.last.append(text)
                try:
                    print(f"[{self.index}] {text}\n", end="", flush=True)
                except (OSError, UserError) as error:
                    self.unwritten = self.unwritten or error

    def _logged(self, output: IO[bytes]) -> Iterator[str]:
        for line in output:
            try:
                self._log.write(line)
            except OSError as error:
                message = f"{self._log.name}: {error.strerror}"
                self.unwritten = self.unwritten or UserError(message, "make room, or name another folder with --logs")
            yield line.decode(errors="replace").rstrip("\n")

    def signal(self, number: int) -> None:
        """Signal the process and what it has started, if it still runs."""
        if self.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)

    def close(self) -> None:
        """Wait for the rest of the output."""
        self._listener.join(LAST_WORDS)

    @property
    def exit_code(self) -> int:
        code = self.popen.returncode
        return code if code >= 0 else 128 - code

    def describe(self) -> str:
        """Which process failed, how, when, and its last lines."""
        code = self.popen.returncode
        if code == RESUMABLE:
            return f"process {self.index} was stopped, and has saved"
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        lines = "".join(f"\n    {line}" for line in self.last)
        return f"process {self.index} {how} after {self.ended - self.begun:.1f} s; its last lines:{lines or ' none'}"


class _Group:
    """The processes of one attempt."""

    def __init__(self, words: list[str], count: int, devices: int, folder: Path) -> None:
        self.stopping = False
        self._ended: queue.Queue[_Process] = queue.Queue()
        self._members: list[_Process] = []
        command, port = [*PROGRAM, *words], _free_port()
        self._start = lambda index: _Process(
            index, command, _environment(index, count, devices, port), folder / f"process-{index}.log"
        )
        self._count = count

    def run(self, grace: float) -> _Process | None:
        """Start all, wait for all; the first that failed, if any has."""
        failed, deadline = None, None
        with self._passing_signals_on():
            try:
                for index in range(self._count):
                    self._members.append(self._start(index))
                    self._members[-1].follow(self._ended)
                left = self._count
                while left:
                    timeout = None if deadline is None else max(deadline - time.monotonic(), 0)
                    try:
                        one = self._ended.get(timeout=timeout)
                    except queue.Empty:
                        self.signal(signal.SIGKILL)
                        deadline = None
                        continue
                    left -= 1
                    if one.popen.returncode and failed is None:
                        stopped = self.stopping or one.popen.returncode == RESUMABLE  # all leave by themselves
                        failed, deadline = one, time.monotonic() + (LAST_SAVE if stopped else grace)
                        if not stopped:
                            self.signal(signal.SIGTERM)
            finally:
                self.signal(signal.SIGKILL)
                for member in self._members:
                    member.close()
        return failed

    @property
    def unwritten(self) -> OSError | UserError | None:
        """The error of the first process whose output or log took no more."""
        return next((member.unwritten for member in self._members if member.unwritten), None)

    def signal(self, number: int) -> None:
        """To all that still run."""
        for member in self._members:
            member.signal(number)

    @contextlib.contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C are for the processes, which save and leave; a second one ends them at once."""

        def handler(number: int, _: Any) -> None:
            self.signal(signal.SIGKILL if self.stopping else number)
            self.stopping = True

        previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, old in previous.items():
                signal.signal(number, old)


def _environment(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What process `index` finds in its environment."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    own = {"PYTHONUNBUFFERED": "1"}
    if count > 1:
        own |= {"JAXLM_COORDINATOR": f"127.0.0.1:{port}", "JAXLM_PROCESSES": str(count)}
        own |= {"JAXLM_PROCESS_ID": str(index), "JAXLM_HOSTS": "1"}
    if devices:
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        own |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    elif count > 1:
        own |= {"JAX_LOCAL_DEVICE_IDS": str(index)}
    return {**os.environ, **own}


def _log_folder(words: Sequence[str]) -> Path:
    """`logs/` in the run directory of `train CONFIG [SECTION.KEY=VALUE ...]`."""
    given = [word for word in words[1:] if not word.startswith("-")]
    if words[0] != "train" or not given:
        return Path("logs")
    return Path(toml.load(given[0], [word for word in given[1:] if "=" in word]).out_dir) / "logs"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(message: str) -> None:
    print(f"launch: {message}", file=sys.stderr, flush=True)
