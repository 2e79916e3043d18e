"""Verdicts on small programs, in each isolation that is here."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jaxlm.sandbox import HarnessError, Limits, Sandbox, Tests, choose, grade, grade_many, judge, run
from jaxlm.sandbox.battery.escapes import processes_with
from jaxlm.sandbox.choose import BACKENDS
from jaxlm.sandbox.inside import wire
from jaxlm.sandbox.verdicts import KINDS

ADD = Tests("def check(f):\n    assert f(1, 2) == 3\n    assert f(5, b=6) == 11\n\ncheck(candidate)\n", names=("add",))
SHORT = Limits(cpu_seconds=1.0, idle_seconds=0.5, memory=128 << 20)
PROGRAMS = {
    "passed": "def add(a, b): return a + b",
    "failed": "def add(a, b): return a - b",
    "exception": "def add(a, b):\n    raise KeyError('no')",
    "syntax": "def add(a, b) return a",
    "no_function": "def sub(a, b): return a - b",
    "not_plain": "def add(a, b): return iter([a])",
    "cpu_time": "def add(a, b):\n    while True: pass",
    "wall_time": "import time\ndef add(a, b): time.sleep(1000)",
    "memory": "def add(a, b): return len([0] * 10**10)",
    "output": "def add(a, b):\n    while True: print('x' * 1000)",
    "violation": "import socket\ndef add(a, b): socket.socket()",
    "crashed": "import os\ndef add(a, b): os.abort()",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_verdict(kind: str, each_sandbox: Sandbox) -> None:
    verdict = grade(PROGRAMS[kind], ADD, SHORT, each_sandbox)
    assert (verdict.kind, verdict.sandbox) == (kind, each_sandbox.name)


MAPPED = "import mmap\nmmap.mmap(-1, SIZE, mmap.MAP_{} | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()"
INSTANTS = {
    "copy": "b'x' * SIZE",
    "private": MAPPED.format("PRIVATE"),
    "shared": MAPPED.format("SHARED"),
    "bash": "dd if=/dev/zero of=/dev/null bs=128M count=1 || echo refused",
}


@pytest.mark.parametrize("way", INSTANTS)
def test_the_kernel_refuses_memory_for_an_instant(way: str, each_sandbox: Sandbox) -> None:
    """One and a half times what is allowed, given back at once: a judge that looks now and then may miss it."""
    limits = replace(SHORT, memory=64 << 20)
    program, language = INSTANTS[way].replace("SIZE", str(96 << 20)), "bash" if way == "bash" else "python"
    if language == "python":
        program = f"import sys\nsys.excepthook = lambda *error: print('refused')\n{program}"
    for _ in range(3):
        ran = run(program, b"", language, limits, each_sandbox)
        assert (ran.kind, ran.stdout) == ("finished", b"refused\n"), ran


def test_threads_take_no_memory_of_a_program(each_sandbox: Sandbox) -> None:
    """Each that allocates would have an arena of its own, of which 64 MB are reserved."""
    program = (
        "import threading\nbarrier = threading.Barrier(8)\n"
        "def work():\n    barrier.wait()\n    bytes(1000).hex()\n    barrier.wait()\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\nprint(len(b'x' * (300 << 20)))"
    )
    ran = run(program, b"", "python", replace(SHORT, cpu_seconds=3.0, memory=512 << 20), each_sandbox)
    assert (ran.kind, ran.stdout) == ("finished", f"{300 << 20}\n".encode()), ran


def test_processes_together_have_no_more_memory(each_sandbox: Sandbox) -> None:
    """The kernel counts all of a container; elsewhere they are looked at every 50 ms, so here they stay longer."""
    program = "for n in 1 2 3; do { dd if=/dev/zero bs=80M count=1 | sleep SECONDS; } & done; wait; echo ESCAPED"
    program = program.replace("SECONDS", "0" if each_sandbox.name.startswith("container") else "1")
    ran = run(program, b"", "bash", replace(SHORT, cpu_seconds=3.0), each_sandbox)
    assert ran.kind == "memory", ran


def test_folders_by_the_names_of_the_judge(each_sandbox: Sandbox) -> None:
    """A program made the folders to which the judge moved others before it removed them: the judge raised."""
    names = "[os.makedirs(f'{name}/x/y') for n in range(1, 40) for name in (f'moved-{n}-{os.getppid()}', f'a{n}')]"
    before = set(Path(tempfile.gettempdir()).glob(f"jaxlm-box-{os.getpid()}-*"))
    ran = run(f"import os\n{names}\nprint('made')", b"", "python", SHORT, each_sandbox)
    assert (ran.kind, ran.stdout) == ("finished", b"made\n"), ran
    assert set(Path(tempfile.gettempdir()).glob(f"jaxlm-box-{os.getpid()}-*")) == before


def test_details(sandbox: Sandbox) -> None:
    failed = grade(PROGRAMS["failed"], ADD, SHORT, sandbox)
    assert failed.details == {"call": "add(1, 2)", "got": "-1", "wanted": "3", "assertion": "assert f(1, 2) == 3"}
    raised = grade("\n\ndef add(a, b):\n    return [][7]", ADD, SHORT, sandbox)
    assert (raised.details["type"], raised.details["line"], raised.text) == ("IndexError", 4, "list index out of range")
    tried = grade("import os\ndef add(a, b):\n    os.system('true')\n    return 0", ADD, SHORT, sandbox)
    assert (tried.kind, tried.details["tried"]) == ("violation", ["fork"])


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ("raise SystemExit(0)", "exception"),
        ("import os; os._exit(0)", "crashed"),
        ("x = '\0'", "syntax"),
        ("x = '\ud800'", "syntax"),
        ("def add(a, b):\n" + "  " * 5000 + "x", "exception"),
        ("#" * (1 << 21), "syntax"),
        ("", "no_function"),
        ("add = 3", "no_function"),
        ("class add: pass", "exception"),
        ("async def add(a, b): return 3", "not_plain"),
        ("import os\ndef add(a, b):\n    os.closerange(3, 999)\n    return 3", "crashed"),
        ("def add(a, b):\n    raise type('E', (Exception,), {'__str__': lambda s: 1/0})()", "exception"),
        (
            "class S(str):\n    def __getitem__(self, key): 1 / 0\n"
            "def add(a, b):\n    raise type('E', (Exception,), {'__str__': lambda s: S('x')})()",
            "exception",
        ),
        (
            "import threading\ndef loop(*a): return sum(0 for n in iter(int, 1))\n"
            "[threading.Thread(target=loop, daemon=True).start() for _ in range(3)]\nadd = loop",
            "cpu_time",
        ),
    ],
)
def test_odd_programs(program: str, kind: str, sandbox: Sandbox) -> None:
    assert grade(program, ADD, SHORT, sandbox).kind == kind


def test_exceptions_reach_the_tests(sandbox: Sandbox) -> None:
    tests = Tests(
        "try:\n    candidate()\nexcept ValueError as error:\n    assert str(error) == 'text'\n"
        "else:\n    assert False\n",
        names=("f",),
    )
    assert grade("class E(ValueError): pass\ndef f(): raise E('text')", tests, SHORT, sandbox).passed
    assert grade("def f(): raise KeyError('text')", tests, SHORT, sandbox).kind == "exception"
    catches = Tests("try:\n    candidate()\nexcept BaseException:\n    pass\n", names=("f",))
    assert grade("import os\ndef f(): os._exit(0)", catches, SHORT, sandbox).kind == "crashed"
    assert grade("def f(): raise SystemExit", catches, SHORT, sandbox).kind == "exception"


def test_objects_of_classes_stay_in_the_program(sandbox: Sandbox) -> None:
    tests = Tests(
        "root = Node(1)\nroot.left = Node(2)\nassert depth(root) == 2\nassert root.left.value == 2\n",
        names=("depth", "Node"),
        classes=("Node",),
    )
    node = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
    assert grade(node + "def depth(n): return 0 if n is None else 1 + depth(n.left)", tests, SHORT, sandbox).passed
    cheat = "    def __eq__(self, other): return True\ndef depth(n): return n"
    assert grade(node + cheat, tests, SHORT, sandbox).kind == "not_plain"


FORGED = {
    "line": ("raised", ["KeyError"], "", {1}, []),
    "digits": ("raised", ["KeyError"], "", 10**5000, []),
    "tried": ("returned", 3, "", 0, 7),
    "names": ("raised", [[]], "", 0, []),
    "no name": ("raised", [], "", 0, []),
    "kind": ("passed", None, "", 0, []),
    "parts": 5,
}


@pytest.mark.parametrize("name", FORGED)
def test_replies_that_a_program_forges(name: str, sandbox: Sandbox) -> None:
    """They give a verdict that can be written down; a set for a number of a line once ended the evaluation."""
    message = wire.encode(FORGED[name])
    data = len(message).to_bytes(4, "little") + message
    forges = (
        f"import contextlib, os\nfor n in range(3, 64):\n    with contextlib.suppress(OSError): os.write(n, {data})"
    )
    verdict = grade(f"{forges}\n{PROGRAMS['passed']}", ADD, SHORT, sandbox)
    assert verdict.kind == "not_plain" and json.dumps(verdict.record()), verdict


PEER = """
import contextlib, socket


def add(a, b):
    told, options = [], 0
    for number in range(3, 64):
        with contextlib.suppress(OSError):
            channel = socket.socket(fileno=number)
            for option in (17, 59, 77):  # SO_PEERCRED, SO_PEERGROUPS, SO_PEERPIDFD
                with contextlib.suppress(PermissionError):
                    told.append((number, option, channel.getsockopt(socket.SOL_SOCKET, option, 64)))
            for option in (16, 76):  # SO_PASSCRED, SO_PASSPIDFD
                with contextlib.suppress(PermissionError):
                    told.append((number, option, channel.setsockopt(socket.SOL_SOCKET, option, 1)))
            options += channel.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            channel.detach()
    assert not told and options, told
    return a + b
"""
LOOP = """
import asyncio, socket


async def later(a, b):
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    there.setblocking(False)
    here.send(b"x")
    assert await asyncio.get_running_loop().sock_recv(there, 1) == b"x"
    return a + b


def add(a, b):
    return asyncio.run(later(a, b))
"""


@pytest.mark.parametrize("program", [PEER, LOOP], ids=["peer", "loop"])
def test_a_socket_names_nobody_and_event_loops_run(program: str, each_sandbox: Sandbox) -> None:
    """The channel of a program is a socket, whose options once gave it a descriptor of the judge."""
    verdict = grade(program, ADD, SHORT, each_sandbox)
    assert verdict.passed, verdict


def test_the_first_process_of_bubblewrap_has_the_filter() -> None:
    if reason := BACKENDS["bwrap"].problem():
        pytest.skip(reason)
    look = "print(*[line for line in open('/proc/1/status') if line.startswith('Seccomp:')])"
    assert run(look, b"", "python", SHORT, choose("bwrap")).stdout.split() == [b"Seccomp:", b"2"]


@pytest.mark.parametrize("source", ["assert True", "raise KeyError", "candidate(lambda: 1)", "import nothing_here"])
def test_faulty_tests_are_no_verdict(source: str, sandbox: Sandbox) -> None:
    with pytest.raises(HarnessError):
        grade("def f(x): return x", Tests(source, names=("f",)), SHORT, sandbox)


BASH = Tests(
    'set -e\nrun_test() {\n    [[ $(candidate "a b" "c") = "c a b" ]]\n'
    '    [[ $(candidate "" "x*") = "x* " ]]\n}\nrun_test',
    names=("swap",),
    language="bash",
)


@pytest.mark.parametrize(
    ("program", "kind"),
    [
        ('echo "$2 $1"', "passed"),
        ('echo "$1 $2"', "failed"),
        ("exit 0", "failed"),
        (":", "failed"),
        ("set() { :; }; exit 0", "failed"),
        ('printf "c a b"; exit 3', "failed"),
        ("while :; do :; done", "cpu_time"),
        ("sleep 100", "wall_time"),
        ("yes", "output"),
        ("kill -9 $PPID", "crashed"),
    ],
)
def test_bash(program: str, kind: str, sandbox: Sandbox) -> None:
    assert grade(program, BASH, SHORT, sandbox).kind == kind


def test_run(each_sandbox: Sandbox) -> None:
    ran = run(
        "import sys\nprint(input().upper())\nprint('no', file=sys.stderr)\nsys.exit(3)",
        b"text\n",
        "python",
        SHORT,
        each_sandbox,
    )
    assert (ran.kind, ran.status, ran.stdout, ran.stderr) == ("finished", 3, b"TEXT\n", b"no\n")
    ran = run("read x; echo $((x * 2))", b"21\n", "bash", SHORT, each_sandbox)
    assert (ran.kind, ran.status, ran.stdout) == ("finished", 0, b"42\n")
    ran = run("def f():\n    1 / 0\nf()", b"", "python", SHORT, each_sandbox)
    assert b"ZeroDivisionError" in ran.stderr and b"worker" not in ran.stderr and ran.status == 1


def test_a_pool_keeps_order_and_stops_at_once(sandbox: Sandbox) -> None:
    kinds = ["passed", "failed", "syntax", "exception"] * 3
    work = [(PROGRAMS[kind], ADD, SHORT) for kind in kinds]
    assert [verdict.kind for verdict in grade_many(work, sandbox, workers=3)] == kinds
    slow = (PROGRAMS["wall_time"], ADD, Limits(idle_seconds=60.0))
    verdicts = grade_many([work[0], slow, slow, slow], sandbox, workers=2)
    assert next(verdicts).passed
    began = time.monotonic()
    verdicts.close()
    assert time.monotonic() - began < 1.5


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left(each_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, threads = descriptors(), threading.active_count()
    mounts = Path("/proc/self/mountinfo").read_bytes()
    for kind in ("passed", "cpu_time", "crashed", "output"):
        grade(PROGRAMS[kind], ADD, SHORT, each_sandbox)
    run("for n in 1 2 3; do (setsid sleep 77.125 &) ; done; mkdir -p a/b; chmod 0 a", b"", "bash", SHORT, each_sandbox)
    assert (descriptors(), threading.active_count()) == (before, threads)
    assert Path("/proc/self/mountinfo").read_bytes() == mounts and list(tmp_path.iterdir()) == []
    assert not processes_with("77.125")


def test_a_box_dies_with_its_judge(each_sandbox: Sandbox) -> None:
    """The judge is killed, so it can clean nothing: the box must notice by itself."""
    code = (
        "from jaxlm.sandbox import *\n"
        f"run('exec -a box-of-a-dead-judge sleep 55', b'', 'bash', Limits(), choose({each_sandbox.name!r}))"
    )
    import subprocess
    import sys

    def alive() -> bool:
        return bool(processes_with("box-of-a-dead-judge\0"))

    judge_process = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 30
        while not alive() and time.monotonic() < end:
            time.sleep(0.05)
        assert alive()
    finally:
        judge_process.send_signal(signal.SIGKILL)
        judge_process.wait()
    end = time.monotonic() + 10
    while alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive()


def test_one_process_would_be_fooled(sandbox: Sandbox) -> None:
    """The same tests in one process are fooled, so the cheat of the battery is a real one."""
    cheat = "class Same:\n    def __eq__(self, other): return True\ndef add(a, b): return Same()"
    assert grade(cheat, ADD, SHORT, sandbox).kind == "not_plain"
    both = run(f"{cheat}\ncandidate = add\n{ADD.source}\nprint('passed')", b"", "python", SHORT, sandbox)
    assert both.stdout == b"passed\n"


def test_a_machine_too_busy_is_no_verdict(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "wall_seconds", 0.2)
    with pytest.raises(HarnessError, match="too busy"):
        grade(PROGRAMS["cpu_time"], ADD, Limits(cpu_seconds=30.0), sandbox)


def test_a_box_that_does_not_start_is_no_verdict(sandbox: Sandbox) -> None:
    broken = sandbox.interpreter._replace(executable="/usr/bin/false")
    with pytest.raises(HarnessError, match="did not start"):
        judge.judge(PROGRAMS["passed"], ADD, SHORT, Sandbox(sandbox.backend, broken))


def test_none_must_be_named() -> None:
    assert choose("none").name == "none"
