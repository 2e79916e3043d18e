"""How many of the eight virtual devices a run of this process sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def on_devices(count: int) -> Iterator[None]:
    """Runs use the first `count` devices."""
    import jax

    some = jax.local_devices()[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: some)
        yield
