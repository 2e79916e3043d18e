"""The battery of escapes: it holds here, and it would notice if it did not."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.sandbox import HarnessError, Sandbox, choose, run
from jaxlm.sandbox.backends import bwrap, landlock
from jaxlm.sandbox.battery import escapes
from jaxlm.sandbox.choose import BACKENDS

SIGNS = {
    *("verdict", "says", "secret", "canary", "mode", "times", "moved", "emptied", "leftover", "twice", "finishes"),
    *("survivor", "knock", "ends"),
}


def test_the_battery_is_data() -> None:
    battery = escapes.battery()
    assert len(battery) >= 60 and len(escapes.battery(quick=True)) >= 12
    assert {escape.sign.split()[0] for escape in battery} == SIGNS
    assert {escape.danger for escape in battery} == {"harmless", "limits"}
    assert min(Counter(escape.name.split("/")[0] for escape in battery).values()) >= 8


def test_the_quick_battery_holds(each_sandbox: Sandbox) -> None:
    tried = escapes.attempt_quick(each_sandbox)
    assert len(tried) >= 12 and not [result.escape.name for result in tried if result.succeeded]


@pytest.mark.soak
def test_the_whole_battery_holds(each_sandbox: Sandbox) -> None:
    tried = list(escapes.attempt_all(escapes.battery(), each_sandbox))
    assert [result for result in tried if result.succeeded] == []


def open_launch(*changes: str):
    """A launch of bubblewrap with a hole: the machine's /tmp is there, or the filter is not."""

    def launch(request):
        made = bwrap.launch(request)
        command = list(made.command)
        if "tmp" in changes:
            command[command.index("--proc") : command.index("--proc")] = ["--bind", "/tmp", "/tmp"]
        if "programs" in changes:
            made = dataclasses.replace(made, filters=())
        if "processes" in changes:
            command.remove("--unshare-pid")
            command[command.index("--disable-userns") : command.index("--disable-userns") + 1] = []
        return dataclasses.replace(made, command=tuple(command))

    return launch


@pytest.mark.parametrize(
    ("hole", "seen"),
    [("tmp", {"file/secret.py", "file/write.py", "file/chmod.py"}), ("programs", {"process/fork.py"})],
)
def test_the_quick_battery_finds_a_planted_hole(hole: str, seen: set[str], sandbox: Sandbox) -> None:
    if sandbox.name != "bwrap":
        pytest.skip("the hole is planted into bubblewrap")
    backend = dataclasses.replace(bwrap.BACKEND, launch=open_launch(hole))
    tried = escapes.attempt_quick(Sandbox(backend, sandbox.interpreter))
    assert seen <= {result.escape.name for result in tried if result.succeeded}


@pytest.mark.parametrize("name", ["file/secret.py", "network/datagram.py"])
def test_landlock_without_its_rules_or_filters_is_noticed(name: str, sandbox: Sandbox) -> None:
    if reason := landlock.problem():
        pytest.skip(reason)

    def launch(request):
        made = landlock.launch(request)
        if name == "network/datagram.py":
            return dataclasses.replace(made, filters=())
        return dataclasses.replace(made, landlock={**(made.landlock or {}), "readable": ["/"]})

    escape = next(escape for escape in escapes.battery() if escape.name == name)
    backend = dataclasses.replace(landlock.BACKEND, launch=launch)
    assert escapes.attempt(escape, Sandbox(backend, sandbox.interpreter)).succeeded


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no sandbox 'bwarp'.*did you mean 'bwrap'"):
        choose("bwarp")
    for name in ("bwrap", "landlock", "seatbelt", "monty"):
        backend = dataclasses.replace(BACKENDS[name], problem=lambda: "was refused")
        monkeypatch.setitem(BACKENDS, name, backend)
    with pytest.raises(UserError, match=r"nothing isolates code here \(bwrap: was refused.*--sandbox none"):
        choose()
    with pytest.raises(UserError, match="the sandbox bwrap does not work here: was refused"):
        choose("bwrap")
    assert choose("none").name == "none"


def test_a_backend_that_does_not_hold_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def quick(tried: Sandbox) -> list[escapes.Tried]:
        asked.append(tried.name)
        if tried.name == "seatbelt":
            raise HarnessError("the box did not start: no such profile")
        return [escapes.Tried(escape, tried.name == "bwrap", "") for escape in escapes.battery(quick=True)[:1]]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing is known of this machine
    monkeypatch.setattr(escapes, "attempt_quick", quick)
    for name in ("bwrap", "landlock", "seatbelt"):
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], problem=lambda: ""))
    assert choose().name == choose("landlock").name == "landlock"
    escape = escapes.battery(quick=True)[0].name
    with pytest.raises(UserError, match=f"the sandbox bwrap does not work here: does not hold: {escape} succeed"):
        choose("bwrap")
    for _ in range(2):
        with pytest.raises(UserError, match="seatbelt does not work here: the box did not start: no such profile"):
            choose("seatbelt")
    assert asked == ["bwrap", "landlock", "seatbelt", "seatbelt"], "what was measured is kept, a failure is not"


def test_the_interpreter(tmp_path) -> None:
    from jaxlm.sandbox import interpreter

    assert interpreter.find(sys.executable) == interpreter.find()
    with pytest.raises(UserError, match="does not run"):
        interpreter.find(str(tmp_path / "python"))
    for program in ("false", "true"):
        with pytest.raises(UserError, match="is no Python for boxes"):
            interpreter.find(f"/usr/bin/{program}")


def test_a_library_that_the_box_cannot_read(tmp_path) -> None:
    """The start of an interpreter reads no more than a few modules, so its programs would fail at an import."""
    if reason := landlock.problem():
        pytest.skip(reason)
    here = choose("landlock").interpreter
    if os.__file__.startswith("/usr/"):
        pytest.skip("the library of this Python lies below /usr, which every box reads")
    shutil.copy(here.executable, tmp_path / "python")
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(here.executable).parent}\n")
    unread = here._replace(executable=str(tmp_path / "python"), roots=(str(tmp_path),))
    with pytest.raises(HarnessError, match=r"did not start: PermissionError: .*/os\.py"):
        run("import typing", b"", "python", escapes.LIMITS, Sandbox(BACKENDS["landlock"], unread))


def test_why_bubblewrap_was_refused() -> None:
    assert "(" in bwrap.explain("bwrap: setting up uid map: Permission denied")
    assert "no message" in bwrap.explain("")


def test_a_process_that_has_ended_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen: it ended between the look at /proc and the look at its command line."""
    monkeypatch.setattr(os, "listdir", lambda _: ["999999999", str(os.getpid()), "self"])
    assert escapes.processes_with("py") == [os.getpid()]
