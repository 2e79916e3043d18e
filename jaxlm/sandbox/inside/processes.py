"""What the processes of a box use, read from /proc by their parents: a box cannot hide a process from it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import NamedTuple

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """One process of /proc."""

    number: int
    parent: int
    running: bool
    cpu_seconds: float
    memory: int
    threads: int


class Usage(NamedTuple):
    """What a tree of processes uses together."""

    cpu_seconds: float
    memory: int
    processes: int
    threads: int
    running: bool


def read_process(number: int) -> Process | None:
    """Read one process; None when it is gone. Time includes children that it has waited for."""
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        threads = int(fields[17])
        states = {fields[0]} if threads == 1 else _thread_states(number)
    except (OSError, IndexError):
        return None
    ticks = sum(int(fields[place]) for place in (11, 12, 13, 14))
    busy = bool(states - {b"S", b"T", b"t", b"Z", b"X", b"I"})
    return Process(number, int(fields[1]), busy, ticks / TICK, int(fields[21]) * PAGE, threads)


def _thread_states(number: int) -> set[bytes]:
    states = set()
    for thread in os.listdir(f"/proc/{number}/task"):
        with open(f"/proc/{number}/task/{thread}/stat", "rb") as file:
            states.add(file.read().rpartition(b")")[2].split()[0])
    return states


def children(number: int) -> list[int]:
    """The children of a process, of all its threads."""
    listed: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{number}/task"):
            with open(f"/proc/{number}/task/{thread}/children") as file:
                listed += [int(word) for word in file.read().split()]
    except OSError:
        return listed
    return listed


def _seconds(text: str) -> float:
    """Read the time of `ps`: [[days-]hours:]minutes:seconds."""
    days, _, rest = text.rpartition("-")
    seconds = 0.0
    for part in rest.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds + 86_400 * int(days or 0)


def listed_by_ps() -> dict[int, Process]:
    """All processes, as `ps` lists them where there is no /proc: a Mac. It counts no threads."""
    import subprocess  # costs each box of Landlock milliseconds

    command = ["ps", "-A", "-o", "pid=,ppid=,stat=,time=,rss="]
    found = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
        number, parent, state, taken, kilobytes = line.split()
        running = state[:1] in {"R", "D", "U"}
        found[int(number)] = Process(int(number), int(parent), running, _seconds(taken), int(kilobytes) << 10, 1)
    return found


def tree(root: int) -> list[Process]:
    """A process and all that descend from it."""
    known = None if os.path.exists("/proc/self/stat") else listed_by_ps()
    listed, waiting = [], [root]
    while waiting:
        number = waiting.pop()
        if process := read_process(number) if known is None else known.get(number):
            listed.append(process)
            waiting += children(number) if known is None else [n for n, one in known.items() if one.parent == number]
    return listed


def usage(root: int) -> Usage:
    """Add up a tree of processes."""
    listed = tree(root)
    return Usage(
        sum((process.cpu_seconds for process in listed), 0.0),
        sum(process.memory for process in listed),
        len(listed),
        max((process.threads for process in listed), default=0),
        any(process.running for process in listed),
    )


def kill_descendants(root: int, seconds: float = 5.0) -> None:
    """Kill everything that descends from a process which gathers orphans, but not itself. Stop them first: a fork bomb
    would otherwise outrun the killing."""
    end = time.monotonic() + seconds
    while (listed := [process.number for process in tree(root) if process.number != root]) and time.monotonic() < end:
        for wanted in (signal.SIGSTOP, signal.SIGKILL):
            for number in listed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, wanted)
        time.sleep(0.005)
