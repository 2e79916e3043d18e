"""The profile of Seatbelt, read as macOS documents its language: no Mac is needed to see what it allows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.sandbox import Limits, Sandbox, choose
from jaxlm.sandbox.backends import Request, seatbelt

VERSION = "/opt/Python.framework/Versions/3.12"
PYTHON, BUNDLE = f"{VERSION}/bin/python3.12", f"{VERSION}/Resources/Python.app/Contents/MacOS/Python"


class Profile:
    """The rules of a box, and what they say. Of several rules that apply the last counts."""

    def __init__(self, language: str, folder: Path, sandbox: Sandbox) -> None:
        python = sandbox.interpreter._replace(executable=PYTHON, roots=("/opt/library", VERSION))
        self.command = seatbelt.launch(Request(python, language, Limits(), 3, 4, folder)).command
        given = [word.split("=", 1) for at, word in enumerate(self.command) if self.command[at - 1] == "-D"]
        self.values, self.asked = dict(given), set()
        text = "\n".join(line.partition(";")[0] for line in self.command[2].splitlines())
        words = iter(text.replace("(", " ( ").replace(")", " ) ").split())
        self.rules = list(self._rules(list(self._parsed(words))))

    def _parsed(self, words: Iterator[str], inner: bool = False) -> Iterator:
        """Lists in lists. Raises: AssertionError where a bracket is missing."""
        for word in words:
            if word == ")":
                assert inner, "a bracket too many"
                return
            yield list(self._parsed(words, True)) if word == "(" else word
        assert not inner, "a bracket is missing"

    def _text(self, form) -> str:
        if form[0] != "param":
            return form.strip('"')
        name = form[1].strip('"')
        self.asked.add(name)
        return self.values[name]

    def _rules(self, forms: list) -> Iterator[tuple[str, list[str], list[tuple[str, str]]]]:
        """The rules that hold for these parameters: an action, operations and filters, of which one must match."""
        for head, *rest in forms:
            if head == "if":
                (_, left, right), (_, *inner) = rest
                if self._text(left) == self._text(right):
                    yield from self._rules(inner)
            elif head != "version":
                filters = [(part[0], self._text(part[1])) for part in rest if isinstance(part, list)]
                yield head, [part for part in rest if isinstance(part, str)], filters

    def allows(self, operation: str, value: str = "") -> bool:
        """Whether an operation is allowed on a path or a target."""
        action_taken = "deny"
        for action, operations, filters in self.rules:
            fits = any(name == "default" or fnmatchcase(operation, name) for name in operations)
            if fits and (not filters or any(_matches(*one, value) for one in filters)):
                action_taken = action
        return action_taken == "allow"


def _matches(kind: str, wanted: str, value: str) -> bool:
    return value == wanted or (kind == "subpath" and value.startswith(f"{wanted}/"))


@pytest.fixture(params=["python", "bash"])
def profile(request: pytest.FixtureRequest, tmp_path: Path, sandbox: Sandbox) -> Profile:
    return Profile(request.param, tmp_path, sandbox)


def test_every_parameter_is_given(profile: Profile) -> None:
    assert profile.asked == set(profile.values) and profile.rules[0] == ("deny", ["default"], [])


def test_a_program_reads_what_it_needs_and_writes_one_folder(profile: Profile, tmp_path: Path) -> None:
    work, box = profile.values["WORK"], profile.values["BOX"]
    for path in (f"{work}/a/b", f"{box}/inside/worker.py", PYTHON, "/opt/library/os.py", "/usr/lib/dyld", "/dev/null"):
        assert profile.allows("file-read-data", path), path
    for path in (str(tmp_path.parent / "secret"), f"{work}x/secret", "/etc/passwd", "/private/etc/passwd", "/Users/me"):
        assert not profile.allows("file-read-data", path), path
        assert not profile.allows("file-map-executable", path), path
    written = [f"{work}/a", "/dev/null", "/dev/zero"]
    read_only = [box, PYTHON, "/usr/lib/dyld", "/dev/random", "/tmp/x", "/private/tmp/x", f"{work}x", "/", "/dev/disk0"]
    for path in (*written, *read_only):
        assert profile.allows("file-write-data", path) == (path in written), path
        for change in ("create", "unlink", "mode", "owner", "times", "xattr"):
            assert profile.allows(f"file-write-{change}", path) == (path == written[0]), (change, path)


def test_programs_processes_and_doors_of_the_system(profile: Profile) -> None:
    bash = profile.values["LANGUAGE"] == "bash"
    for path in (PYTHON, BUNDLE):  # a Python of a framework starts its bundle
        for operation in ("process-exec", "file-read-data", "file-map-executable"):
            assert profile.allows(operation, path), (operation, path)
    for path in ("/bin/bash", "/usr/bin/true"):
        assert profile.allows("process-exec", path) == bash, path
    for path in (f"{profile.values['WORK']}/program", "/sbin/mount", "/usr/sbin/chroot", f"{VERSION}/bin/pip"):
        assert not profile.allows("process-exec", path), path
    assert profile.allows("process-fork") == bash
    assert profile.allows("signal", "self") and not profile.allows("signal", "others")
    assert profile.allows("signal", "same-sandbox") == bash
    for operation in ("network-outbound", "network-inbound", "network-bind", "mach-lookup", "mach-register",
                      "ipc-posix-shm-write-data", "ipc-sysv-shm", "iokit-open", "process-info-pidinfo", "sysctl-write",
                      "system-socket", "file-mount", "file-ioctl", "mach-priv-task-port"):  # fmt: skip
        assert not profile.allows(operation), operation


def test_seatbelt_is_refused_elsewhere() -> None:
    if sys.platform == "darwin":
        pytest.skip("this is a Mac")
    with pytest.raises(UserError, match="the sandbox seatbelt does not work here: Seatbelt is for macOS"):
        choose("seatbelt")
