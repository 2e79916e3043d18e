"""Landlock and seccomp: no namespaces needed, so it works where they are refused (Ubuntu's AppArmor, Docker).

The worker closes the machine's files to itself, gives up capabilities, and loads a filter that refuses sockets, signals
to others, and changes of owner and mode, which Landlock does not cover (Documentation/userspace-api/landlock.rst).
Linux 5.13; scripts in bash need Linux 6.12, where Landlock also keeps signals in.
"""

from __future__ import annotations

import functools

from jaxlm.sandbox.backends import INSIDE, Backend, Launch, Request, python_command, seccomp

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")


def launch(request: Request) -> Launch:
    """Describe a box of Landlock."""
    readable = (*request.interpreter.roots, *SYSTEM)
    return Launch(
        command=tuple(python_command(request.interpreter.executable, str(INSIDE.parent), "worker", request.job)),
        work=str(request.folder),
        readable=(*readable, "/dev"),
        filters=seccomp.filters(request.language, shared=True),
        landlock={"readable": list(readable), "devices": list(DEVICES)},
    )


@functools.cache
def problem() -> str:
    """Look whether the kernel has Landlock. Returns why not, or nothing."""
    if reason := seccomp.problem():
        return reason
    import ctypes

    version = ctypes.CDLL(None, use_errno=True).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return "" if version >= 1 else "this kernel has no Landlock (Linux 5.13, and lsm=landlock)"


BACKEND = Backend("landlock", problem, launch, owns_files=False)
