"""A try: what another implementation may do, in words, and the variant of a model that does it too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxlm.parity.diagnose.variant import Patch, Variant, blocks_with

Try = tuple[str, Callable[[], Variant]]
"""What the other implementation does, and the variant; making it raises ValueError where the config refuses it."""


def shown(value: Any) -> str:
    """A value as it stands in a config file."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def values(v: Variant, key: str, others: tuple[Any, ...], section: str = "") -> Iterator[Try]:
    """The other values of an option, in all blocks."""
    ours = getattr(getattr(v.model, section) if section else v.model, key)
    for value in others:
        if value != ours:
            name = f"{section}.{key}" if section else key
            what = f"{name} is {shown(value)} instead of {shown(ours)}"
            yield what, functools.partial(v.with_options, section, **{key: value})


def zeroed(v: Variant, what: str, *endings: str, fill: float = 0.0) -> Iterator[Try]:
    """The tensors whose names end so are left out of the computation."""
    # A tensor that already has the neutral value makes no difference, and the try would be the model itself.
    if any(name.endswith(endings) and np.any(tensor != fill) for name, tensor in v.tensors.items()):
        change = lambda name, x: np.full(x.shape, fill) if name.endswith(endings) else None  # noqa: E731
        yield what, lambda: v.with_tensors(change)


def patching(v: Variant, what: str, *wrong: Patch) -> Try:
    """With torch_ref patched."""
    return what, lambda: v.with_patch(*wrong)


def rotates(v: Variant) -> bool:
    """Whether any block has rotary positions."""
    return any(block.positions == "rope" for block in blocks_with(v.model, "attention"))


def attends(v: Variant) -> bool:
    """Whether any block has attention."""
    return any(True for _ in blocks_with(v.model, "attention"))


def mixes(v: Variant, *mixers: str) -> bool:
    """Whether any block has one of these mixers."""
    return any(True for mixer in mixers for _ in blocks_with(v.model, mixer))
