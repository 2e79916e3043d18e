"""The far end of a box in a container: its first process, which starts the worker and carries its descriptors.

The worker runs as the same user, so this process hides its memory and descriptors from it (`PR_SET_DUMPABLE`), holds
none that the worker inherits, and as the first process of its namespace cannot be killed from inside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time

from . import frames, processes, wire
from .confine import call

PR_SET_DUMPABLE = 4
LOOK = 0.05
EVENTS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
"""Events of the container's own control group, in version 2 and in version 1."""


def main(work: str) -> None:
    """Receive the job, start the worker in the folder `work`, carry until it has ended, and end with its status."""
    os.chdir(work)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    far = frames.Ends(0, os.dup(1))
    come = dict([far.receive(), far.receive()])
    job = wire.decode(come[frames.JOB])
    child, readers, near = _start(job, come[frames.STDIN], far.writes)
    ended: int | None = None
    looked, killed = 0.0, killed_for_memory()

    def report() -> None:  # the folder to write in is a disk of its own
        used, disk = processes.usage(child), os.statvfs(".")
        written = disk.f_files - disk.f_ffree, (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        memory = used.memory if killed_for_memory() == killed else sys.maxsize
        words = (used.cpu_seconds, memory, used.processes, used.threads, int(used.running), *written)
        far.send(frames.USAGE, " ".join(map(str, words)).encode() + b"\n")

    def tick() -> bool:
        nonlocal ended, looked
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            report()
        while ended is None and (waited := os.waitpid(-1, os.WNOHANG))[0]:
            if waited[0] == child:
                ended = os.waitstatus_to_exitcode(waited[1])
        return ended is not None

    frames.carry(far, readers, near, tick=tick, wait=0.01)
    if ended is None:
        os.kill(child, signal.SIGKILL)
    for number, channel in readers.items():  # what the worker wrote before it ended
        os.set_blocking(number, False)
        with contextlib.suppress(OSError):
            while part := os.read(number, 1 << 16):
                far.send(channel, part)
    report()
    status = 70 if ended is None else ended
    far.send(frames.ENDED, str(status if status >= 0 else 128 - status).encode())
    os._exit(0)


def killed_for_memory() -> int:
    """Count processes that the kernel has ended because all together took more memory than the container may have."""
    for file in EVENTS:
        try:
            with open(file) as lines:
                return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        except OSError:
            continue
    return 0


def _start(job: dict, stdin: bytes, writes: int) -> tuple[int, dict[int, int], dict[int, int]]:
    """Fork the worker. Returns its number, the descriptors to read with their channels, and those to write."""
    out, err = os.pipe(), os.pipe()
    readers, near, inherited = {out[0]: frames.STDOUT, err[0]: frames.STDERR}, {}, []
    for channel, name in frames.sockets_of(job):
        near[channel], job[name] = (end.detach() for end in socket.socketpair())
        readers[near[channel]] = channel
        inherited.append(job[name])
    number, text = wire.memory_file("job", wire.encode(job)), wire.memory_file("stdin", stdin)
    child = os.fork()
    if child == 0:
        os.dup2(text, 0)
        os.dup2(out[1], 1)
        os.dup2(err[1], 2)
        for descriptor in {text, out[1], err[1], writes, *readers, *near.values()} - {0, 1, 2, number, *inherited}:
            os.close(descriptor)
        from . import worker

        worker.main(number)
        sys.exit()  # as a program ends: what it printed is written out, and threads are waited for
    for descriptor in (number, text, out[1], err[1], *inherited):
        os.close(descriptor)
    return child, readers, near
