"""Backends that need another system, by what they would start; and the pieces that carry a box through two streams."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.sandbox import HarnessError, Limits, Sandbox, Tests, backends, box, choose, grade, leftovers, run
from jaxlm.sandbox.backends import Request, container
from jaxlm.sandbox.battery.escapes import processes_with
from jaxlm.sandbox.choose import BACKENDS
from jaxlm.sandbox.inside import frames, processes, relay

ADD = Tests("assert candidate(1, 2) == 3\nassert candidate(5, b=6) == 11\n", names=("add",))
SHORT = Limits(cpu_seconds=1.0, idle_seconds=1.0, memory=128 << 20)

DOCKER = r"""#!{python}
'''A stand-in for docker: it writes down its command lines, and runs what is to run without any isolation.'''
import json, os, sys, time
words = sys.argv[1:]
with open({log!r}, 'a') as log:
    log.write(json.dumps(words) + '\n')
if os.environ.get('HOME') != {home!r}:
    sys.exit('the engine of another user: HOME is ' + os.environ.get('HOME', 'not set'))
if words[0] == '--version':
    print({version!r})
elif words[0] == 'version':
    sys.exit('Cannot connect to the Docker daemon') if os.path.exists({down!r}) else print('28.0')
elif words[:2] == ['image', 'inspect']:
    print('sha256:0123') if words[-1] == 'python:here' else sys.exit('No such image')
elif words[0] == 'run':
    mounts = [words[n + 1] for n, word in enumerate(words) if word == '-v']
    box = os.path.dirname(mounts[0].split(':')[0])
    # A folder whose disk is empty, as the box's own is.
    rest = words[words.index('python:here') + 1:]
    rest = [word.replace('/box', box).replace('/jaxlm-work', '/proc') for word in rest]
    rest = [word.replace('relay.main(', 'relay.EVENTS = [' + repr({events!r}) + ']; relay.main(') for word in rest]
    with open({log!r} + '.box', 'w') as file:
        file.write(str(os.getpid()))
    os.execv({python!r}, [{python!r}, *rest, {log!r}])
elif words[0] == 'rm':  # Docker's engine waits until the client has taken what the box printed
    box = open({log!r} + '.box').read()
    for _ in range(400):
        try:
            command = open('/proc/' + box + '/cmdline').read()
        except OSError:
            command = ''
        if 'relay' not in command:
            sys.exit()
        time.sleep(0.05)
    with open({log!r}, 'a') as log:
        log.write(json.dumps(['the client never read it']) + '\n')
"""


@pytest.fixture(params=["Docker version 28.0, build 0"])
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox, request) -> Iterator[Path]:
    """Put a stand-in for docker on the path. Returns the file of its command lines."""
    log, program = tmp_path / "log.jsonl", tmp_path / "bin" / "docker"
    program.parent.mkdir()
    places = {"log": str(log), "down": str(tmp_path / "down"), "home": str(tmp_path), "version": request.param}
    places["events"] = str(tmp_path / "memory.events")
    program.write_text(DOCKER.format(python=sandbox.interpreter.executable, **places))
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")))
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    container.engine.cache_clear()
    yield log
    container.engine.cache_clear()


def test_a_box_in_a_container(docker: Path, tmp_path: Path) -> None:
    """The protocol from end to end: job, calls, verdict, output, status and limits pass through two streams."""
    backend, python = container.of("python:here")
    assert (backend.problem(), python.version) == ("", "sha256:0123")
    there = Sandbox(backend, python)
    verdict = grade("def add(a, b): return a + b", ADD, SHORT, there)
    assert (verdict.kind, verdict.sandbox) == ("passed", "container:python:here")
    assert grade("def add(a, b): return a - b", ADD, SHORT, there).kind == "failed"
    assert grade("def add(a, b):\n    while True: pass", ADD, SHORT, there).kind == "cpu_time"
    program = "import sys\nprint(input().upper())\nprint('no', file=sys.stderr)\nsys.exit(3)"
    ran = run(program, b"text\n", "python", SHORT, there)
    assert (ran.kind, ran.status, ran.stdout, ran.stderr) == ("finished", 3, b"TEXT\n", b"no\n")
    assert run("print(1, flush=True)\nprint(2)", b"", "python", SHORT, there).stdout == b"1\n2\n"
    assert run("import os\nos.abort()", b"", "python", SHORT, there).kind == "crashed"
    assert run("import time\ntime.sleep(60)", b"", "python", SHORT, there).kind == "wall_time"


def test_the_command_line_of_a_container(docker: Path, sandbox: Sandbox) -> None:
    request = Request(sandbox.interpreter, "python", Limits(), 3, 4)
    words = container.run_command("docker", "python:here", "name", request)
    wanted = ["--network none", "--read-only", "--cap-drop ALL", "--security-opt no-new-privileges", "--rm"]
    wanted += ["--ulimit nofile=256:256", "--ipc none", "--pids-limit 12", "--pull never"]
    wanted += [f"--memory {576 << 20}", f"--memory-swap {576 << 20}"]
    for option in wanted:
        assert f" {option} " in " ".join(words)
    assert not [word for word in words if word.startswith("--privileged") or "docker.sock" in word]
    assert [word for word in words if word.endswith("/box/inside:ro")]
    assert words.index("python:here") < words.index("-c")
    run("pass", b"", "python", SHORT, Sandbox(*container.of("python:here")))
    asked = [json.loads(line) for line in docker.read_text().splitlines()]
    assert [words[0] for words in asked[1:]] == ["version", "image", "--version", "run"]
    assert "nr_inodes=1025" in " ".join(asked[-1]) and "--read-only-tmpfs=false" not in asked[-1]


@pytest.mark.parametrize("docker", ["podman version 4.3.1"], indirect=True)
def test_the_command_line_of_podman_by_the_name_of_docker(docker: Path) -> None:
    """It refuses nr_inodes, fills a new disk with what the image has there, and leaves /tmp writable."""
    run("pass", b"", "python", SHORT, Sandbox(*container.of("python:here")))
    words = json.loads(docker.read_text().splitlines()[-1])
    assert "--read-only-tmpfs=false" in words and "notmpcopyup" in " ".join(words) and "nr_inodes" not in str(words)


def test_podman_by_a_link(tmp_path: Path) -> None:
    """It calls itself by the name of the link."""
    podman, link = tmp_path / "podman", tmp_path / "docker"
    podman.write_text("#!/bin/sh\necho docker version 4.3.1\n")
    podman.chmod(0o755)
    link.symlink_to(podman)
    assert container.is_podman(str(link)) and not container.is_podman("/bin/echo")


def test_containers_that_are_refused(docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no engine of this machine
    with pytest.raises(UserError, match=r"does not work here: no image 'other' here: .*docker pull other"):
        choose("container:other")
    with pytest.raises(UserError, match="no sandbox 'container:'"):
        choose("container:")
    (tmp_path / "down").touch()
    container.engine.cache_clear()
    with pytest.raises(UserError, match=r"engine of docker does not answer: Cannot connect.*; podman is not installed"):
        choose("container:python:here")
    monkeypatch.setenv("PATH", "/nothing")
    container.engine.cache_clear()
    with pytest.raises(UserError, match="docker is not installed; podman is not installed"):
        choose("container:python:here")


def test_a_container_ends_with_its_judge(docker: Path) -> None:
    """The judge is killed: its client notices, and then the relay."""
    code = (
        "from jaxlm.sandbox import *\nfrom jaxlm.sandbox.backends import container\n"
        "there = Sandbox(*container.of('python:here'))\n"
        "run('import time\\ntime.sleep(55)', b'', 'python', Limits(idle_seconds=60.0), there)"
    )
    judge = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert until(lambda: len(processes_with(str(docker.parent))) >= 3)  # client, relay, worker
    finally:
        judge.kill()
        judge.wait()
    assert until(lambda: not processes_with(str(docker.parent)))


def until(true, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def test_a_container_whose_output_nobody_reads_any_more(docker: Path) -> None:
    """The judge has read enough and ends the box; its client still waits to write, and the engine for the client."""
    there = Sandbox(*container.of("python:here"))
    assert run("while True: print('x' * 100_000)", b"", "python", SHORT, there).kind == "output"
    assert [json.loads(line)[0] for line in docker.read_text().splitlines()][-2:] == ["run", "rm"]


def test_what_the_kernel_ended_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container's control group of either version; elsewhere there is none."""
    second, first = tmp_path / "memory.events", tmp_path / "memory.oom_control"
    monkeypatch.setattr(relay, "EVENTS", (str(second), str(first)))
    assert relay.killed_for_memory() == 0
    first.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert relay.killed_for_memory() == 2
    second.write_text("low 0\nhigh 0\nmax 7\noom 3\noom_kill 1\noom_group_kill 0\n")
    assert relay.killed_for_memory() == 1


def test_a_program_that_the_kernel_ends_for_memory(docker: Path, tmp_path: Path) -> None:
    """The container's control group counts one more; what it counted before, and another kill, are none."""
    there, events = Sandbox(*container.of("python:here")), tmp_path / "memory.events"
    events.write_text("oom_kill 2\n")
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    counted = f"pathlib.Path({str(events)!r}).write_text('oom_kill 3\\n'); {kill}"
    for act, kind in ((kill, "crashed"), (counted, "memory")):
        events.write_text("oom_kill 2\n")
        program = f"import os, pathlib, signal\ndef add(a, b): {act}"
        assert run(f"{program}\nadd(1, 2)", b"", "python", SHORT, there).kind == kind
        events.write_text("oom_kill 2\n")
        assert grade(program, ADD, SHORT, there).kind == kind


def test_bash_that_is_missing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine, or in an image; never a verdict on a script."""
    tests = Tests("candidate", ("f",), language="bash")
    monkeypatch.setattr(box, "SHELL", "/nothing/bash")
    with pytest.raises(HarnessError, match="/nothing/bash is missing in the box"):
        grade(":", tests, SHORT, sandbox)
    assert run(":", b"", "bash", SHORT, sandbox).stderr == b"/nothing/bash is missing in the box\n"
    monkeypatch.setattr(backends, "SHELL", "/nothing/bash")
    here = dataclasses.replace(sandbox.backend, languages=frozenset({"python"}))
    with pytest.raises(HarnessError, match=f"{sandbox.name} runs no bash: /nothing/bash is missing"):
        grade(":", tests, SHORT, Sandbox(here, sandbox.interpreter))


def test_an_engine_that_fails_is_no_verdict(docker: Path) -> None:
    backend, python = container.of("python:here")
    with pytest.raises(HarnessError, match="did not start"):
        run("pass", b"", "python", SHORT, _gone(backend, python))


def test_an_engine_that_does_not_end_its_box(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, ends, ask = Sandbox(*container.of("python:here")), [], box.ask

    def raise_timeout(command, **_):
        ends.append(command)
        raise subprocess.TimeoutExpired(command, 60)

    def late(*command: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", raise_timeout)
            return ask(*command)

    monkeypatch.setattr(box, "ask", late)
    with pytest.raises(HarnessError, match=r"the box may still run: .*docker does not run: .*after 60 seconds"):
        run("while True: print('x' * 100_000)", b"", "python", SHORT, there)
    assert len(ends) == 1 and until(lambda: not processes_with(str(docker.parent)))


def _gone(backend, python) -> Sandbox:
    """The same backend, whose image has no Python."""

    def launch(request):
        made = backend.launch(request)
        return dataclasses.replace(made, command=(*made.command[:-1], "raise SystemExit(127)"))

    return Sandbox(dataclasses.replace(backend, launch=launch), python)


def test_frames_in_pieces() -> None:
    reads, writes = os.pipe()
    ends = frames.Ends(reads, writes)
    ends.send(frames.STDOUT, b"a" * 300)
    ends.send(frames.STATUS, b"")
    data = os.read(reads, 1000)
    with ThreadPoolExecutor(1) as thread:
        seen = thread.submit(lambda: [ends.receive(), ends.receive()])
        for byte in data:
            os.write(writes, bytes([byte]))
        assert seen.result() == [(frames.STDOUT, b"a" * 300), (frames.STATUS, b"")]
    os.write(writes, bytes([0]) + (1 << 30).to_bytes(4, "little"))
    with pytest.raises(ValueError, match="longer than allowed"):
        ends.receive()
    os.close(writes)
    with pytest.raises(EOFError):
        ends.receive()
    os.close(reads)


def test_a_socket_whose_other_end_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac a socket without its other end cannot be shut down; the rest is carried all the same."""

    class Gone(socket.socket):
        def shutdown(self, how: int) -> None:
            raise OSError(errno.ENOTCONN, "Socket is not connected")

    (reads, writes), (near, other) = os.pipe(), socket.socketpair()
    for channel, data in ((frames.STATUS, b""), (frames.ENDED, b"3")):
        frames.Ends(-1, writes).send(channel, data)
    os.close(writes)
    monkeypatch.setattr(frames.socket, "socket", Gone)
    with near, other:
        assert frames.carry(frames.Ends(reads, -1), {}, {frames.STATUS: near.fileno()}) == 3
    os.close(reads)


def test_processes_by_ps() -> None:
    """What a Mac's judge sees of a tree of processes, on a system that can tell both ways."""
    if not shutil.which("ps"):
        pytest.skip("no ps here")
    child = subprocess.Popen(["/bin/sh", "-c", "sleep 30 & sleep 30"])
    try:
        assert until(lambda: not processes.listed_by_ps()[child.pid].running)  # it has begun to wait
        before, by_ps, after = time.process_time(), processes.listed_by_ps(), time.process_time()
        assert by_ps[child.pid].parent == os.getpid()
        # Without children; in whole seconds, and counted by the kernel's tick.
        tick = 1 / processes.TICK
        assert math.floor(before - tick) <= by_ps[os.getpid()].cpu_seconds <= after + tick
        assert by_ps[os.getpid()].memory > 1 << 20
    finally:
        processes.kill_descendants(child.pid)
        child.kill()
        child.wait()


def test_folders_of_dead_judges_are_swept(tmp_path: Path) -> None:
    """Only those of our own user, machine and process namespace, whose process is dead; however they were left."""
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    here = leftovers.owner().split("-")[3]
    namespace, _, machine = here.partition(".")
    names = {"dead": f"jaxlm-box-{dead.pid}-{here}-a", "alive": f"jaxlm-box-{os.getpid()}-{here}-b",
             "elsewhere": f"jaxlm-box-{dead.pid}-1.{machine}-c", "other": f"jaxlm-box-x-{here}-d",
             "foreign machine": f"jaxlm-box-{dead.pid}-{namespace}.0123456789abcdef-e",
             "without one": f"jaxlm-box-{dead.pid}-{namespace}-f"}  # fmt: skip
    for name in names.values():
        (tmp_path / name / "deep" / "deeper").mkdir(parents=True)
        (tmp_path / name / "deep").chmod(0)
    (tmp_path / f"jaxlm-box-{dead.pid}-{here}-link").symlink_to(tmp_path / names["other"])
    foreign = tmp_path / f"jaxlm-box-{dead.pid}-{here}-foreign"
    foreign.mkdir()
    if os.getuid() == 0:
        os.chown(foreign, 65534, 65534)
    leftovers.sweep_folders(str(tmp_path))
    kept = {*names.values(), f"jaxlm-box-{dead.pid}-{here}-link"} - {names["dead"]}
    assert {path.name for path in tmp_path.iterdir()} == kept | ({foreign.name} if os.getuid() == 0 else set())
    for name in kept - {f"jaxlm-box-{dead.pid}-{here}-link"}:
        (tmp_path / name / "deep").chmod(stat.S_IRWXU)


def test_names_of_two_machines_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process namespace has the same number on every one."""
    monkeypatch.setattr(leftovers, "_place", leftovers._place.__wrapped__)  # as another process would find it
    here = leftovers.owner()
    monkeypatch.setattr(leftovers.platform, "node", lambda: "another-machine")
    there = leftovers.owner()
    assert here != there and here.split(".")[0] == there.split(".")[0]


def test_a_killed_judge_leaves_a_folder_that_the_next_removes(tmp_path: Path) -> None:
    if reason := BACKENDS["landlock"].problem():
        pytest.skip(reason)
    judge = "from jaxlm.sandbox import *\nrun('pass', b'', 'python', Limits(), choose('landlock'))"
    made = "from jaxlm.sandbox import leftovers\nleftovers.own_folder()"
    kill = f"{made}\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", kill], env=environment, check=False)
    assert len(list(tmp_path.glob("jaxlm-box-*"))) == 1
    subprocess.run([sys.executable, "-c", judge], env=environment, check=True)
    assert list(tmp_path.glob("jaxlm-box-*")) == []


def test_a_process_that_a_killed_judge_left_is_ended(tmp_path: Path) -> None:
    """A program named as bubblewrap is, which holds the job of a dead judge, ends; that of a living one does not."""
    program = tmp_path / "bwrap"
    shutil.copy("/bin/sleep", program)
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    namespace = leftovers.owner().split("-")[3]
    waiting = {}
    for number in (dead.pid, os.getpid()):
        job = os.memfd_create(f"jaxlm-box-{number}-{namespace}")
        waiting[number] = subprocess.Popen([program, "60"], pass_fds=[job])
        os.close(job)
    try:
        leftovers.end_orphans()
        assert waiting[dead.pid].wait(10) == -signal.SIGKILL
        assert waiting[os.getpid()].poll() is None
    finally:
        for process in waiting.values():
            process.kill()
            process.wait()
