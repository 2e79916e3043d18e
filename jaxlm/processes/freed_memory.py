"""Memory that XLA:CPU frees is kept for the next step of a training; elsewhere it can be given back to the kernel.

A step takes its temporary buffers, about a gigabyte for a small model, with one malloc. By default glibc maps such a
buffer anew each time, and the kernel clears it page by page: a quarter of the step. Measured in benchmarks/README.md.
"""

from __future__ import annotations

import ctypes
import gc
import sys

# glibc's malloc.h: parameter and value
_SETTINGS = {
    "M_MMAP_THRESHOLD": (-3, 2**31 - 1),  # take large blocks from the heap, not from mmap
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),  # do not give the end of the heap back
    "M_TOP_PAD": (-2, 64 * 2**20),  # grow the heap in large steps
    "M_ARENA_MAX": (-8, 1),  # one heap for all threads: only the main one can grow that far
}


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed; elsewhere nothing happens. Call before the first thread starts."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    for parameter, value in _SETTINGS.values():
        mallopt(parameter, value)


def give_freed_memory_back() -> None:
    """Collect what nothing refers to, and give what glibc's malloc keeps of it back to the kernel.

    Each thread has a heap of its own, and keeps there what others could use: after outputs of all modules, gigabytes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def one_step_at_a_time() -> None:
    """Tell JAX to compute on the CPU in the thread that asks, so that a step takes its buffer where the last one was.

    A step that is begun early takes as much again, and what other threads take meanwhile lies where the buffer was: the
    memory of a run grows to 1.7 times this one (benchmarks/train_memory.py). Call before JAX's first computation, which
    reads the setting once; a program that has computed before keeps what it had.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
