"""JAX's settings belong to the program that uses the library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """Whatever is changed in `jax.config` inside is as before when it ends. Also a decorator."""
    before = dict(jax.config.values)
    try:
        yield
    finally:
        for name, value in before.items():
            if jax.config.values[name] is not value and jax.config.values[name] != value:
                jax.config.update(name, value)
