"""The seccomp filter: which system calls a box refuses, as one table for x86-64 and arm64.

A filter is a short program that the kernel runs before each system call (Linux, Documentation/userspace-
api/seccomp_filter.rst). Two filters are made of the table. The first is for every box. The second, for Python answers,
also refuses to start a process or a program. The worker loads them when it has started; bubblewrap loads the first
itself, for its own process in the box too, and its worker only the second.
"""

from __future__ import annotations

import errno
import functools
import platform
import struct
import sys
from typing import NamedTuple

from jaxlm.sandbox.inside import confine

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH numbers of linux/audit.h."""
NAMES = {"arm64": "aarch64"}
"""What Macs call a machine; their containers run Linux on the same one."""


class Numbers(NamedTuple):
    """The numbers of one system call; None where the architecture never had it."""

    x86_64: int
    aarch64: int | None


# name x86_64 aarch64, from asm/unistd_64.h and asm-generic/unistd.h; a dash is a call that arm64 does not have.
_TABLE = """
ptrace 101 117               process_vm_readv 310 270     process_vm_writev 311 271    process_madvise 440 440
kcmp 312 272                 pidfd_open 434 434           pidfd_getfd 438 438          pidfd_send_signal 424 424
process_mrelease 448 448     vmsplice 278 75              mount 165 40                 umount2 166 39
pivot_root 155 41            chroot 161 51                fsopen 430 430               fsconfig 431 431
fsmount 432 432              fspick 433 433               move_mount 429 429           open_tree 428 428
mount_setattr 442 442        unshare 272 97               setns 308 268                mknod 133 -
mknodat 259 33               setuid 105 146               setgid 106 144               setreuid 113 145
setregid 114 143             setresuid 117 147            setresgid 119 149            setfsuid 122 151
setfsgid 123 152             setgroups 116 159            capset 126 91                bpf 321 280
perf_event_open 298 241      userfaultfd 323 282          io_uring_setup 425 425       io_uring_enter 426 426
io_uring_register 427 427    keyctl 250 219               add_key 248 217              request_key 249 218
init_module 175 105          finit_module 313 273         delete_module 176 106        kexec_load 246 104
kexec_file_load 320 294      reboot 169 142               swapon 167 224               swapoff 168 225
sethostname 170 161          setdomainname 171 162        settimeofday 164 170         clock_settime 227 112
adjtimex 159 171             clock_adjtime 305 266        acct 163 89                  quotactl 179 60
quotactl_fd 443 443          syslog 103 116               iopl 172 -                   ioperm 173 -
modify_ldt 154 -             vhangup 153 58               personality 135 92           name_to_handle_at 303 264
open_by_handle_at 304 265    fanotify_init 300 262        fanotify_mark 301 263        memfd_create 319 279
memfd_secret 447 447         mq_open 240 180              mq_unlink 241 181            shmget 29 194
shmat 30 196                 shmctl 31 195                msgget 68 186                semget 64 190
socket 41 198                connect 42 203               bind 49 200                  listen 50 201
accept 43 202                accept4 288 242              setpriority 141 140          sched_setscheduler 144 119
sched_setparam 142 118       sched_setattr 314 274        ioprio_set 251 30            migrate_pages 256 238
move_pages 279 239           mbind 237 235                set_mempolicy 238 237        set_mempolicy_home_node 450 450
setrlimit 160 164            setxattr 188 5               lsetxattr 189 6              fsetxattr 190 7
removexattr 197 14           lremovexattr 198 15          fremovexattr 199 16          chown 92 -
lchown 94 -                  fchown 93 55                 fchownat 260 54              chmod 90 -
fchmod 91 52                 fchmodat 268 53              fchmodat2 452 452            utime 132 -
utimes 235 -                 futimesat 261 -              utimensat 280 88             uselib 134 -
ustat 136 -                  sysfs 139 -                  _sysctl 156 -                nfsservctl 180 42
fork 57 -                    vfork 58 -                   execve 59 221                execveat 322 281
clone 56 220                 clone3 435 435               prlimit64 302 261            prctl 157 167
ioctl 16 29                  socketpair 53 199            kill 62 129                  tkill 200 130
tgkill 234 131               rt_sigqueueinfo 129 138      rt_tgsigqueueinfo 297 240
getsockopt 55 209            setsockopt 54 208
"""


_WORDS = iter(_TABLE.split())
NUMBERS = {
    name: Numbers(int(x86), None if arm == "-" else int(arm))
    for name, x86, arm in zip(_WORDS, _WORDS, _WORDS, strict=True)
}
FIRST_UNKNOWN = 463
"""Calls from this number on are newer than the table: the filter says that the kernel lacks them."""

SHARED_ONLY = ("chmod", "fchmod", "fchmodat", "fchmodat2", "utime", "utimes", "futimesat", "utimensat", "setrlimit")
"""Change a file's mode or times.

Landlock does not cover them, so its boxes refuse them; a box with its own mounts needs not.
"""

OWN_PROCESS = ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
PROGRAMS = ("fork", "vfork", "execve", "execveat")
OPTIONS = ("getsockopt", "setsockopt")
BY_ARGUMENT = (*OPTIONS, "tkill", "clone", "clone3", "prlimit64", "prctl", "ioctl", "socketpair")
CONDITIONAL = {*OWN_PROCESS, *PROGRAMS, *SHARED_ONLY, *BY_ARGUMENT}

PROCESS = int.from_bytes(confine.PLACE_OF_PROCESS, "little")
"""Stands for the number of the box's own process, which the worker puts in its place."""

CLONE_THREAD = 0x00010000
CLONE_NAMESPACES = 0x7E020000
PR_SET_PDEATHSIG = 1
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
AF_UNIX, SOL_SOCKET = 1, 1
STREAM = 0x80801
"""SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, the bits of a type that is allowed.

Datagrams of a pair could go to any socket of the machine.
"""
PEER_OPTIONS = (16, 17, 59, 76, 77)
"""SO_PASSCRED, SO_PEERCRED, SO_PEERGROUPS, SO_PASSPIDFD and SO_PEERPIDFD.

They tell who is at the other end, which may be the judge.
"""

# Instructions of classic BPF (linux/filter.h): load a word, jump, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _refuse(error: int = errno.EPERM) -> bytes:
    return _step(_RETURN, _ERRNO | error)


_PASS = _step(_RETURN, _ALLOW)


def _argument(index: int, high: bool = False) -> bytes:
    return _step(_LOAD, _ARGUMENTS + 8 * index + 4 * high)


def _program(machine: str, bodies: dict[str, bytes], first: bytes = b"") -> bytes:
    """Make a filter that allows all calls but some, of which it runs the body, which must return.

    Args:
        machine: `x86_64` or `aarch64`; this machine's by default. A program of another one, whose numbers mean other
            calls, is killed.
        bodies: what to do by the name of the call; the number of the call is in the accumulator.
        first: runs before, with the number in the accumulator too.
    """
    machine = machine or NAMES.get(platform.machine(), platform.machine())
    made = _step(_LOAD, _ARCHITECTURE) + _step(_EQUAL, ARCHITECTURES[machine], 1, 0) + _step(_RETURN, _KILL)
    made += _step(_LOAD, _NUMBER) + first
    for name, body in bodies.items():
        if (number := getattr(NUMBERS[name], machine)) is not None:
            made += _step(_EQUAL, number, 0, len(body) // 8) + body
    return made + _PASS


def base_filter(machine: str = "", shared: bool = False) -> bytes:
    """Make the filter that every box has: no mounts, no namespaces, no sockets, no tracing, no keys, no kernel doors.

    Args:
        machine: as in `_program`.
        shared: refuse changes of limits, modes and times too, for boxes among the machine's own files and processes.

    Returns:
        The bytes of an array of `struct sock_filter`.
    """
    refused = [name for name in NUMBERS if name not in CONDITIONAL or (shared and name in SHARED_ONLY)]
    terminal = _step(_EQUAL, TIOCSTI, 1, 0) + _step(_EQUAL, TIOCLINUX, 0, 1)
    peer = b"".join(_step(_EQUAL, option, 0, 1) + _refuse() for option in PEER_OPTIONS)
    option = _argument(1) + _step(_EQUAL, SOL_SOCKET, 1, 0) + _PASS + _argument(2) + peer + _PASS
    pair = _argument(0) + _step(_EQUAL, AF_UNIX, 1, 0) + _refuse()
    pair += _argument(1) + _step(_ANY_BIT, 0xFFFFFFFF ^ STREAM, 0, 1) + _refuse() + _PASS
    rules = {
        # glibc asks clone3 first; its flags lie in memory, where a filter cannot look. Without it glibc takes clone.
        "clone3": _refuse(errno.ENOSYS),
        "clone": _argument(0) + _step(_ANY_BIT, CLONE_NAMESPACES, 0, 1) + _refuse() + _PASS,
        "prctl": _argument(0) + _step(_EQUAL, PR_SET_PDEATHSIG, 0, 1) + _refuse() + _PASS,
        "ioctl": _argument(1) + terminal + _refuse() + _PASS,
        "socketpair": pair,  # for event loops
        **dict.fromkeys(OPTIONS, option),
    }
    if shared:  # the worker has set its limits before; asking for them stays allowed
        asking = _argument(2, high=True) + _step(_EQUAL, 0, 0, 1) + _PASS + _refuse()
        rules["prlimit64"] = _argument(2) + _step(_EQUAL, 0, 1, 0) + _refuse() + asking
    unknown = _step(_AT_LEAST, FIRST_UNKNOWN, 0, 1) + _refuse(errno.ENOSYS)
    return _program(machine, {**dict.fromkeys(refused, _refuse()), **rules}, unknown)


def alone_filter(process: int = PROCESS, machine: str = "") -> bytes:
    """Make the filter of a Python answer: threads, but no process, no program, and no signal to any other process."""
    own = _argument(0) + _step(_EQUAL, process, 1, 0) + _refuse() + _PASS
    bodies = {**dict.fromkeys([*PROGRAMS, "tkill"], _refuse()), **dict.fromkeys(OWN_PROCESS, own)}
    bodies["clone"] = _argument(0) + _step(_ANY_BIT, CLONE_THREAD, 1, 0) + _refuse() + _PASS
    return _program(machine, bodies)


def problem() -> str:
    """Say why the table is not for this machine, or nothing."""
    known = sys.platform == "linux" and platform.machine() in ARCHITECTURES
    return "" if known else f"needs Linux on {' or '.join(ARCHITECTURES)}"


@functools.cache
def filters(language: str, shared: bool = False) -> tuple[bytes, ...]:
    """Make the filters that are loaded before code of others in a language runs, that of every box first."""
    return (base_filter(shared=shared), *([alone_filter()] if language == "python" else []))
