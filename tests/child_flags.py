"""XLA's flags for processes that tests start, which otherwise spend most of their time in LLVM."""

from __future__ import annotations

import os


def with_devices(count: int = 0) -> str:
    """`XLA_FLAGS` as conftest.py sets them (`make soak`: optimised code), with so many virtual devices; 0: one."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "host_platform_device_count" not in flag]
    return " ".join([*flags, *([f"--xla_force_host_platform_device_count={count}"] if count else [])])
