"""How long a test waits for other processes."""

from __future__ import annotations

HANGS = 900
"""Seconds after which a process is taken to hang, also one that compiles beside other work. No bound on speed."""
