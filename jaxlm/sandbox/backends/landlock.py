"""Landlock and seccomp: no namespaces needed, so it works where they are refused (Ubuntu's AppArmor, Docker).

The worker closes the machine's files to itself, gives up capabilities, and loads a filter that refuses sockets, signals
to others, and changes of owner and mode, which Landlock does not cover (Documentation/userspace-api/landlock.rst).
Linux 5.13; scripts in bash need Linux 6.12, where Landlock also keeps signals in.
"""

from __future__ import annotations

import functools
import platform
import sys

from jaxlm.sandbox.backends import INSIDE, Backend, Launch, Request, python_command, seccomp

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")


def launch(request: Request) -> Launch:
    """Describe a box of Landlock."""
    work, box, bash = str(request.folder), str(INSIDE.parent), request.language == "bash"
    readable = (*request.interpreter.roots, *SYSTEM)
    alone = () if bash else (seccomp.alone_filter(seccomp.PROCESS),)
    rules = {"readable": list(readable), "work": work, "devices": list(DEVICES), "programs": bash}
    return Launch(
        command=tuple(python_command(request.interpreter, box, request.job)),
        work=work,
        box=box,
        readable=(*readable, "/dev"),
        filters=(seccomp.base_filter(shared=True), *alone),
        landlock=rules,
        supervise=bash,
    )


@functools.cache
def problem() -> str:
    """Look whether the kernel has Landlock. Returns why not, or nothing."""
    if sys.platform != "linux":
        return "Landlock is for Linux"
    if platform.machine() not in seccomp.ARCHITECTURES:
        return f"the table of system calls lacks {platform.machine()}"
    import ctypes

    version = ctypes.CDLL(None, use_errno=True).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return "" if version >= 1 else "this kernel has no Landlock (Linux 5.13, and lsm=landlock)"


BACKEND = Backend("landlock", problem, launch, owns_files=False)
