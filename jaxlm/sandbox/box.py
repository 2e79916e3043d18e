"""One box: its birth, what it uses while it lives, and its death with everything in it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
from pathlib import Path
from typing import NamedTuple

from jaxlm.sandbox import leftovers
from jaxlm.sandbox.backends import SHELL, Launch, Request, Sandbox, environment
from jaxlm.sandbox.inside import processes, wire
from jaxlm.sandbox.interpreter import DID_NOT_RUN, ask
from jaxlm.sandbox.verdicts import HarnessError, Limits


class Job(NamedTuple):
    """What a box is to do: `answer`, `tests` or `run`, and the texts for it."""

    role: str
    language: str
    texts: dict[str, object]
    channel: int = -1
    """A socket to another box."""
    stdin: bytes = b""


class Box:
    """A process that runs the worker in isolation, with pipes for what it prints and a socket for its state."""

    def __init__(self, sandbox: Sandbox, job: Job, limits: Limits) -> None:
        """Start a box. Raises: HarnessError where the isolation does not start."""
        self.limits = limits.for_language(job.language)
        self.folder = None if sandbox.backend.owns_files else leftovers.own_folder()
        self.output = {"stdout": bytearray(), "stderr": bytearray()}
        self.printed = 0
        self.ready = self.ended = False
        self.first: int | None = None  # the first process inside, where the backend has own process numbers
        self.disk: int | None = None
        self.seen = processes.Usage(0.0, 0, 0, 0, True)
        self.written = (0, 0)  # files and bytes, as the backend last reported
        leftovers.sweep()
        self._start(sandbox, job)

    def _start(self, sandbox: Sandbox, job: Job) -> None:
        self.status, theirs = socket.socketpair()
        self.info, info = os.pipe()
        (out, stdout), (err, stderr) = os.pipe(), os.pipe()
        self.readers = {"stdout": out, "stderr": err}
        for number in self.readers.values():
            os.set_blocking(number, False)
        # The job names its own descriptor's neighbours, so the file is made first and written when all is known.
        job_file = wire.memory_file(leftovers.owner(), b"")
        request = Request(sandbox.interpreter, job.language, self.limits, job_file, info, self.folder)
        launch = sandbox.backend.launch(request)
        os.write(job_file, wire.encode(self._job(job, launch, theirs.fileno())))
        os.lseek(job_file, 0, os.SEEK_SET)
        stdin = wire.memory_file("stdin", job.stdin)
        self.launch = launch
        reporting = [info] if launch.reports or launch.measures else []
        kept = [job_file, theirs.fileno(), *launch.keep, *reporting, *([] if job.channel < 0 else [job.channel])]
        try:
            self.process = subprocess.Popen(
                launch.command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env=launch.environment or environment(launch.work),
                pass_fds=kept,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            self._release()
            raise HarnessError(f"the box does not start: {error}") from None
        finally:
            theirs.close()
            for number in (job_file, stdin, info, stdout, stderr, *launch.keep):
                os.close(number)

    def _job(self, job: Job, launch: Launch, status: int) -> dict:
        limits = {name: value for name, value in dataclasses.asdict(self.limits).items() if isinstance(value, int)}
        limits["cpu"] = max(1, -int(-self.limits.cpu_seconds // 1))
        own = {name: getattr(launch, name) for name in ("work", "readable", "filters", "landlock")}
        own |= {"role": job.role, "language": job.language, "status": status, "channel": job.channel, "limits": limits}
        return {**job.texts, **own, "shell": SHELL, "environment": environment(launch.work)}

    def greet(self) -> None:
        """Read the worker's first word and let it go. Raises: HarnessError if the box is not as it must be."""
        word = self.status.recv(600)
        if word != b"R":
            self.process.wait(timeout=10)
            self.drain()
            last = bytes(self.output["stderr"]).decode(errors="replace").strip()[-300:]
            raise HarnessError(f"the box did not start: {word[1:].decode(errors='replace') or last or 'no message'}")
        if self.launch.reports:
            text = os.read(self.info, 4096).decode()
            self.first = int(text.partition('"child-pid":')[2].strip().split(",")[0].split("\n")[0])
            with contextlib.suppress(OSError):
                self.disk = os.open(f"/proc/{self.first}/root/work", os.O_PATH | os.O_DIRECTORY)
        if self.launch.measures:
            os.set_blocking(self.info, False)
        self.ready = True
        self.status.send(b"G")

    def usage(self) -> processes.Usage:
        """What the box uses now; of processes that we do not see, as the backend last reported."""
        if not self.launch.measures:
            return processes.usage(self.first or self.process.pid)
        try:
            seconds, memory, number, threads, running, *written = os.read(self.info, 1 << 16).splitlines()[-1].split()
            self.written = int(written[0]), int(written[1])
            return processes.Usage(float(seconds), int(memory), int(number), int(threads), running == b"1")
        except (BlockingIOError, IndexError, ValueError):
            return self.seen

    def drain(self) -> bool:
        """Read what was printed. Returns whether it is too much."""
        for name, number in list(self.readers.items()):
            with contextlib.suppress(BlockingIOError):
                while part := os.read(number, 1 << 16):
                    self.printed += len(part)
                    self.output[name] += part[: max(0, self.limits.output - len(self.output[name]))]
                    if self.printed > self.limits.output:
                        return True
                os.close(self.readers.pop(name))
        return False

    def excess(self) -> dict[str, str] | None:
        """Look what the box uses. Returns a record, the kind of verdict and the reason, when it is more than it may."""
        before = self.seen
        now = self.usage()
        # A process that has just ended takes its time with it until its parent has waited for it.
        self.seen = now._replace(cpu_seconds=max(now.cpu_seconds, before.cpu_seconds))
        self.seen = self.seen._replace(running=now.running or now.cpu_seconds > before.cpu_seconds)
        limits, own = self.limits, 2 if self.first or self.folder else 1
        names, used = self.written
        if self.disk is not None:
            state = os.statvfs(self.disk)
            names, used = state.f_files - state.f_ffree, (state.f_blocks - state.f_bfree) * state.f_frsize
        elif self.folder:
            used, names = folder_use(self.folder, limits.names)
        for kind, value, bound, text in (
            ("cpu_time", now.cpu_seconds, limits.cpu_seconds, f"{limits.cpu_seconds:g} s of processor time"),
            ("memory", now.memory, limits.memory, f"{limits.memory >> 20} MB in use"),
            ("violation", now.processes - own, limits.processes, f"{limits.processes} processes"),
            ("violation", now.threads - 1, limits.threads, f"{limits.threads} threads"),
            ("violation", names, limits.names, f"{limits.names} files"),
            ("violation", used, limits.disk_bytes, f"{limits.disk_bytes >> 20} MB in files"),
        ):
            if value > bound:
                return {"kind": kind, "text": f"more than {text}"}
        return None

    def kill(self) -> int:
        """Kill everything in the box and wait until it is dead. Returns the exit status, negative for a signal.

        Raises: HarnessError where the engine of the box does not end it.
        """
        failure = ""
        if self.launch.end and self.process.poll() is None:
            # The client first: Docker's engine waits until it has read all, and it until we have.
            os.killpg(self.process.pid, signal.SIGKILL)
            asked = ask(*self.launch.end)
            failure = asked.stderr if asked.returncode == DID_NOT_RUN else ""
        if self.first is not None:
            _kill_and_wait(self.first)
        elif self.process.poll() is None:
            processes.kill_descendants(self.process.pid)
        if self.process.poll() is None and (self.first is None or not self.ready):
            self.process.kill()
        status = self.process.wait()
        if failure:
            raise HarnessError(f"the box may still run: {failure}")
        return 128 - status if status > 128 else status  # a wrapper tells of signal n as 128 + n

    def close(self) -> None:
        """Kill, and remove everything that the box wrote. Raises: HarnessError, as `kill`."""
        try:
            self.kill()
        finally:
            self._release()

    def _release(self) -> None:
        self.status.close()
        for number in (self.info, *self.readers.values(), *([] if self.disk is None else [self.disk])):
            os.close(number)
        self.readers, self.disk = {}, None
        if self.folder:
            leftovers.remove_folder(self.folder)


def _kill_and_wait(number: int) -> None:
    """Kill the first process of a process namespace.

    Its descriptor reports when the kernel has ended all the others.
    """
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(number)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll(10_000)
        finally:
            os.close(handle)


def folder_use(folder: Path, enough: int) -> tuple[int, int]:
    """Count bytes and names in a folder, up to `enough` names. What cannot be read counts as one name."""
    used, names, waiting = 0, 0, [str(folder)]
    while waiting and names <= enough:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    names += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
    return used, names
