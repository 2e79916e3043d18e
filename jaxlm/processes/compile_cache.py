"""How XLA compiles, and where compiled programs are kept."""

from __future__ import annotations

import os
from pathlib import Path

import jax

RUN_ONCE = {"xla_backend_optimization_level": 0}
"""Options on a CPU for a program that compiles longer than it runs."""


def enable_compilation_cache(cache_dir: str) -> None:
    """Keep all compiled programs on disk: a second start is quick. JAX's own environment variables override it."""
    settings = {
        "jax_compilation_cache_dir": str(Path(cache_dir).absolute() / "jax"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
