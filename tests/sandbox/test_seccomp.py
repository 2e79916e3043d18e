"""The table of system calls, and the filters made of it, run by a small machine for their language."""

from __future__ import annotations

import errno
import struct

import pytest

from jaxlm.sandbox.backends import seccomp
from jaxlm.sandbox.backends.seccomp import ARCHITECTURES, NUMBERS, alone_filter, base_filter

WITHOUT_ARM = {
    *("mknod", "iopl", "ioperm", "modify_ldt", "chown", "lchown", "chmod", "utime", "utimes", "futimesat", "uselib"),
    *("ustat", "sysfs", "fork", "vfork", "_sysctl"),
}
ALLOW, REFUSED = 0x7FFF0000, 0x00050000 | errno.EPERM
SET = 0x80801
"""SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC."""


def verdict(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """Run a filter for one system call."""
    data = struct.pack("<iIQ6Q", number, ARCHITECTURES[machine], 0, *arguments, *[0] * (6 - len(arguments)))
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at = value = 0
    while True:
        code, yes, no, constant = steps[at]
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            value = struct.unpack_from("<I", data, constant)[0]
        else:
            hit = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
            at += yes if hit else no


def test_every_name_has_both_numbers() -> None:
    assert {name for name, numbers in NUMBERS.items() if numbers.aarch64 is None} == WITHOUT_ARM
    for column in (0, 1):
        known = [numbers[column] for numbers in NUMBERS.values() if numbers[column] is not None]
        assert len(known) == len(set(known)) and max(known) < seccomp.FIRST_UNKNOWN
    assert (NUMBERS["ptrace"], NUMBERS["socket"], NUMBERS["execve"]) == ((101, 117), (41, 198), (59, 221))


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_each_filter_refuses(machine: str) -> None:
    column = 0 if machine == "x86_64" else 1
    base, shared, alone = base_filter(machine), base_filter(machine, shared=True), alone_filter(77, machine)
    call = {name: numbers[column] for name, numbers in NUMBERS.items() if numbers[column] is not None}
    for name in ("socket", "mount", "ptrace", "bpf", "keyctl", "io_uring_setup", "setuid", "unshare"):
        assert verdict(base, machine, call[name]) == REFUSED, name
    for name in ("clone", "execve", "kill", "prlimit64", "fchmod"):
        assert verdict(base, machine, call[name]) == ALLOW, name
    assert verdict(shared, machine, call["fchmod"]) == verdict(shared, machine, call["setrlimit"]) == REFUSED
    assert verdict(shared, machine, call["prlimit64"], 0, 7, 0) == ALLOW
    assert verdict(shared, machine, call["prlimit64"], 0, 7, 1 << 40) == REFUSED
    assert verdict(base, machine, call["clone"], 0x10000011) == REFUSED
    assert verdict(base, machine, call["clone3"]) == verdict(base, machine, 467) == 0x00050000 | errno.ENOSYS
    for kind in (1, SET):
        assert verdict(base, machine, call["socketpair"], 1, kind) == ALLOW
    for family, kind in ((2, 1), (1, 2), (1, 3), (1, 5), (1, 2 | SET), (1, 1 << 20 | 1)):
        assert verdict(base, machine, call["socketpair"], family, kind) == REFUSED, (family, kind)
    for option in (16, 17, 59, 76, 77):
        assert verdict(base, machine, call["getsockopt"], 9, 1, option) == REFUSED, option
        assert verdict(base, machine, call["setsockopt"], 9, 1, option) == REFUSED, option
    for level, option in ((1, 3), (1, 4), (1, 38), (1, 39), (6, 17)):
        assert verdict(base, machine, call["getsockopt"], 9, level, option) == ALLOW, (level, option)
    assert verdict(alone, machine, call["clone"], 0x00010F00) == ALLOW
    assert verdict(alone, machine, call["clone"], 17) == verdict(alone, machine, call["execve"]) == REFUSED
    assert (verdict(alone, machine, call["kill"], 77), verdict(alone, machine, call["kill"], 1)) == (ALLOW, REFUSED)


def test_a_mac_on_arm_makes_the_filter_of_its_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "arm64")
    assert base_filter() == base_filter("aarch64") and alone_filter(77) == alone_filter(77, "aarch64")


def test_another_architecture_is_killed() -> None:
    data = base_filter("x86_64")
    assert verdict(data, "aarch64", 0) == 0x80000000 == verdict(base_filter("aarch64"), "x86_64", 0)
