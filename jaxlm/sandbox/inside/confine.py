"""Give up rights before any code of others runs: limits of the kernel, Landlock, capabilities, system calls.

The C functions are called through `_ctypes` itself: importing `ctypes` would cost more than all the rest.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 38, 22, 36
SECCOMP_MODE_FILTER = 2
M_ARENA_MAX = -8
CAPSET = {"x86_64": 126, "aarch64": 91}
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PLACE_OF_PROCESS = (0x7FFFFFFE).to_bytes(4, "little")
"""Stands in the filter for the number of this process, which nobody outside the box knows."""

# Rights of linux/landlock.h.
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG = (
    1 << n for n in range(9)
)
MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV = (1 << n for n in range(9, 16))
RIGHTS_BY_VERSION = {1: MAKE_SYM * 2 - 1, 2: REFER * 2 - 1, 3: TRUNCATE * 2 - 1, 5: IOCTL_DEV * 2 - 1}
READ = READ_FILE | READ_DIR
WORK = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM | REFER | TRUNCATE


def _address_space() -> int:
    """Count what a worker has reserved before the program begins, and room for the libraries that it may still load.

    The kernel bounds memory at once, where a judge that looks now and then would miss an instant. It bounds what is
    reserved, so one arena is made to serve all threads: each further one would reserve 64 MB.
    """
    try:  # noqa: SIM105 - contextlib would cost a box more than it saves here
        call("mallopt", M_ARENA_MAX, 1)
    except OSError:
        pass  # another libc, which has no arenas
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + (16 << 20)


def limit(limits: dict) -> None:
    """Set the limits of the kernel for this process and its children. A hard limit that is already lower stays."""
    import resource

    wanted = {
        "RLIMIT_CPU": (limits["cpu"], limits["cpu"] + 1),
        "RLIMIT_FSIZE": (limits["file_bytes"],) * 2,
        "RLIMIT_NOFILE": (limits["files"],) * 2,
        **dict.fromkeys(["RLIMIT_CORE", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE"], (0, 0)),
    }
    if sys.platform != "darwin":
        wanted["RLIMIT_AS"] = (_address_space() + limits["memory"],) * 2
        wanted["RLIMIT_NPROC"] = (limits["processes"] + limits["threads"] + 1,) * 2
        wanted["RLIMIT_STACK"] = (8 << 20,) * 2
    for name, (soft, hard) in wanted.items():
        if (number := getattr(resource, name, None)) is not None:
            ceiling = resource.getrlimit(number)[1]
            if ceiling != resource.RLIM_INFINITY:
                soft, hard = min(soft, ceiling), min(hard, ceiling)
            resource.setrlimit(number, (soft, hard))


def call(name: str, *arguments: int | bytes) -> int:
    """Call a function of libc that returns a C int.

    Raises: OSError without the reason, which only ctypes would know.
    """
    import _ctypes

    this_process: Any = None
    result = _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(this_process, 0), name), arguments)
    if result < 0:
        raise OSError(f"{name}{tuple(a for a in arguments if isinstance(a, int))} was refused")
    return result


def _address(data: bytes) -> bytes:
    """Find where the bytes of an object lie, as a pointer in memory.

    CPython keeps them behind the head of the object.
    """
    return (id(data) + bytes.__basicsize__ - 1).to_bytes(8, "little")


def _filter(program: bytes) -> None:
    if program:
        program = program.replace(PLACE_OF_PROCESS, os.getpid().to_bytes(4, "little"))
        head = (len(program) // 8).to_bytes(8, "little") + _address(program)
        call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, head)


def _landlock(folders: dict, work: str, programs: bool) -> None:
    """Allow to read some folders and to write one; everything else on the machine's disks is closed (Landlock)."""
    version = call("syscall", LANDLOCK_CREATE, 0, 0, 1)
    handled = RIGHTS_BY_VERSION[max(v for v in RIGHTS_BY_VERSION if v <= version)]
    ruleset = handled.to_bytes(8, "little")
    ruleset += (3 if version >= 4 else 0).to_bytes(8, "little")  # bind and connect
    ruleset += (3 if version >= 6 else 0).to_bytes(8, "little")  # abstract sockets and signals
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = call("syscall", LANDLOCK_CREATE, ruleset, size, 0)
    rights = [(path, READ | (EXECUTE if programs else 0)) for path in folders["readable"]]
    rights += [(path, READ_FILE | WRITE_FILE) for path in folders["devices"]] + [(work, WORK)]
    for path, allowed in rights:
        if not os.path.exists(path):
            continue
        if not os.path.isdir(path):
            allowed &= EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = (allowed & handled).to_bytes(8, "little") + folder.to_bytes(4, "little")
        call("syscall", LANDLOCK_ADD, rules, 1, rule, 0)
        os.close(folder)
    call("syscall", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _drop_capabilities() -> None:
    header = (0x20080522).to_bytes(4, "little") + bytes(4)
    call("syscall", CAPSET[os.uname().machine], header, bytes(24))


def _supervise(status: int) -> None:
    """Fork. The parent stays outside the box, and kills whatever the box started when it ends or the judge dies."""
    import select
    import signal

    from . import processes

    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return
    kept = os.dup(status)
    os.closerange(3, kept)
    os.closerange(kept + 1, 1024)
    judge, code = select.poll(), 70
    judge.register(kept, select.POLLHUP)
    os.dup2(os.open("/dev/null", os.O_RDWR), 1)
    os.dup2(1, 2)
    ended = False
    while not ended and not judge.poll(20):
        while not ended and (waited := os.waitpid(-1, os.WNOHANG))[0]:
            if ended := waited[0] == child:
                code = os.waitstatus_to_exitcode(waited[1])
    while children := processes.children(os.getpid()):
        for process in children:
            os.kill(process, signal.SIGKILL)
        for _ in children:
            os.waitpid(-1, 0)
    os._exit(code if code >= 0 else 128 - code)


def confine(job: dict) -> None:
    """Give up the rights that the job names. Afterwards nothing can be taken back. Raises: OSError."""
    folders, bash = job["landlock"], job["language"] == "bash"
    if folders is not None and bash:
        _supervise(job["status"])
    limit(job["limits"])
    if folders is not None:
        if not bash:
            call("prctl", PR_SET_PDEATHSIG, 9, 0, 0, 0)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        os.chdir(job["work"])
        _landlock(folders, job["work"], programs=bash)
        _drop_capabilities()
    for program in job["filters"]:
        _filter(program)
