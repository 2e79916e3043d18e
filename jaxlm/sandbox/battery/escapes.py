"""The battery: programs that try to escape or to cheat, and whether they succeed here, seen from outside.

Each is one small file in a folder beside this one. Its head says what it tries, by which sign success is seen, and how
dangerous it is. All are written so that success harms nothing: they ask with signal 0, mount on a folder of their own,
stop a bomb after seconds. Still they run in boxes only; `--sandbox none` has no table.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from jaxlm.sandbox.backends import Sandbox
from jaxlm.sandbox.judge import judge, run_program
from jaxlm.sandbox.verdicts import Limits, Ran, Tests

BATTERY = Path(__file__).parent
LIMITS = Limits(cpu_seconds=1.0, idle_seconds=1.0, memory=128 << 20)
CHEATED = Tests(
    source="""def check(candidate):
    assert candidate(3) == 4
    assert candidate([1, 2]) == 'ab'
    assert abs(candidate(0) - 2.5) < 1e-6


check(candidate)
""",
    names=("ENTRY",),
)
"""No honest function passes by accident."""


@dataclass(frozen=True)
class Escape:
    """One file of the battery."""

    name: str
    language: str
    tries: str
    sign: str
    danger: str
    quick: bool
    source: str


class Tried(NamedTuple):
    """What came of one escape."""

    escape: Escape
    succeeded: bool
    seen: str


def read(path: Path) -> Escape:
    """Read one file of the battery."""
    head = {}
    text = path.read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("# "):
            break
        key, _, value = line[2:].partition(": ")
        head[key] = value
    room, name = path.parent.name, path.name.removesuffix(".txt")
    language = "bash" if name.endswith(".sh") else "python"
    quick = head.get("quick") == "yes"
    return Escape(f"{room}/{name}", language, head["tries"], head["sign"], head["danger"], quick, text)


def battery(quick: bool = False) -> list[Escape]:
    """The whole battery, or the few that show in two seconds whether a way to isolate holds."""
    listed = [read(path) for path in sorted(BATTERY.glob("*/*.txt"))]
    return [escape for escape in listed if escape.quick] if quick else listed


class Outside:
    """Things outside the box that escapes reach for: a secret, listeners, and a place where nothing must appear."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="jaxlm-outside-"))
        self.mark = f"jaxlm-mark-{secrets.token_hex(6)}"
        self.text = secrets.token_hex(16)
        self.secret, self.canary = self.folder / "secret", self.folder / "canary"
        self.secret.write_text(self.text)
        self.before = self.secret.stat()
        self.listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.listeners[1].bind(str(self.folder / "socket"))
        if os.name == "posix" and os.path.exists("/proc"):
            self.listeners.append(socket.socket(socket.AF_UNIX))
            self.listeners[2].bind(f"\0{self.mark}")
        for listener in self.listeners:
            listener.listen(4)
        self.listeners.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.listeners[-1].bind(str(self.folder / "datagrams"))
        for listener in self.listeners:
            listener.setblocking(False)

    def fill(self, source: str, limits: Limits) -> str:
        """Put the names of these things into a program."""
        values = {
            "SECRET": self.secret, "CANARY": self.canary, "MARK": self.mark, "SOCKET": self.folder / "socket",
            "PORT": self.listeners[0].getsockname()[1], "JUDGE": os.getpid(), "GROUP": os.getpgid(0),
            "ACCOUNTS": hashlib.sha256(Path("/etc/passwd").read_bytes()).hexdigest(),
            "MEMORY": limits.memory >> 20, "HALF": limits.memory >> 21, "DATAGRAMS": self.folder / "datagrams",
        }  # fmt: skip
        for name, value in values.items():
            source = source.replace(f"@{name}@", str(value))
        return source

    def changed(self, sign: str) -> bool:
        """Look whether a sign is there."""
        if sign == "canary":
            return self.canary.exists()
        if sign == "moved":
            return not self.secret.exists()
        if sign == "emptied":
            return self.secret.stat().st_size != self.before.st_size
        if sign == "mode":
            return stat.S_IMODE(self.secret.stat().st_mode) != stat.S_IMODE(self.before.st_mode)
        if sign == "times":
            return self.secret.stat().st_mtime != self.before.st_mtime
        if sign == "survivor":
            return bool(processes_with(self.mark))
        return any(_knocked(listener) for listener in self.listeners)

    def close(self) -> None:
        """Remove them."""
        for listener in self.listeners:
            listener.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def _knocked(listener: socket.socket) -> bool:
    try:
        if listener.type == socket.SOCK_DGRAM:
            return bool(listener.recv(1))
        listener.accept()[0].close()
    except OSError:
        return False
    return True


def processes_with(mark: str) -> list[int]:
    """Find processes that have a text in their command line."""
    listed = []
    for number in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if mark.encode() in Path("/proc", number, "cmdline").read_bytes():
                listed.append(int(number))
        except OSError:  # it has ended since
            continue
    return listed


def attempt(escape: Escape, sandbox: Sandbox, limits: Limits = LIMITS) -> Tried:
    """Run one escape in a box and look from outside whether it succeeded."""
    outside = Outside()
    source = outside.fill(escape.source, limits)
    try:
        if escape.sign == "verdict":
            verdict = judge(source, CHEATED, limits, sandbox)
            return Tried(escape, verdict.passed, f"{verdict.kind}: {verdict.text}")
        ran = run_program(source, b"", escape.language, limits, sandbox)
        if escape.sign == "twice":
            ran = run_program(source, b"", escape.language, limits, sandbox)
        if escape.sign == "survivor":
            time.sleep(0.05)
        # An interpreter without an operating system ends most programs by an exception instead of a limit.
        ended = sandbox.backend.lower_bound and (ran.kind != "finished" or ran.status != 0)
        succeeded = not (escape.sign.startswith("ends") and ended) and _succeeded(escape, ran, outside)
        return Tried(escape, succeeded, f"{ran.kind}: {_last_line(ran)}")
    finally:
        outside.close()


def _succeeded(escape: Escape, ran: Ran, outside: Outside) -> bool:
    sign, *kinds = escape.sign.split()
    if sign in {"says", "twice"}:
        return ran.kind == "finished" and b"ESCAPED" in ran.stdout
    if sign == "secret":
        return outside.text.encode() in ran.stdout
    if sign == "finishes":
        return ran.kind == "finished"
    if sign == "ends":
        return ran.kind not in kinds
    if sign == "leftover":
        return bool(list(Path(tempfile.gettempdir()).glob(f"jaxlm-box-{os.getpid()}-*")))
    return outside.changed(sign)


def _last_line(ran: Ran) -> str:
    lines = ran.stderr.decode(errors="replace").strip().splitlines() or ran.stdout.decode(errors="replace").splitlines()
    return (lines[-1] if lines else ran.text)[:120]


def attempt_all(escapes: list[Escape], sandbox: Sandbox, limits: Limits = LIMITS, workers: int = 2) -> Iterator[Tried]:
    """Try escapes, several at a time, in order; those that look for leftovers alone, at the end."""
    alone = [escape for escape in escapes if escape.sign == "leftover"]
    with ThreadPoolExecutor(workers) as pool:
        together = [escape for escape in escapes if escape not in alone]
        yield from pool.map(lambda escape: attempt(escape, sandbox, limits), together)
    for escape in alone:
        yield attempt(escape, sandbox, limits)


def attempt_quick(sandbox: Sandbox) -> list[Tried]:
    """Try the quick battery. Raises: HarnessError, where boxes do not start."""
    limits = replace(LIMITS, memory=64 << 20)
    escapes = [escape for escape in battery(quick=True) if escape.language in sandbox.backend.languages]
    return list(attempt_all(escapes, sandbox, limits, workers=4))
