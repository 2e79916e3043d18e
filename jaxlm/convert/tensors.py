"""Named tensors, and what may be known of one without reading it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Tensors(Mapping[str, Any]):  # of arrays; a check of types would read one
    """Arrays by name, each read when it is asked for. What a kind of tensors knows better, it overrides."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; a file has it in its header."""
        return self[name].shape

    def dtype(self, name: str) -> str:
        """Of a tensor, by numpy's name."""
        return self[name].dtype.name

    def origin(self, name: str) -> str:
        """Where a tensor is stored, for messages; empty: in memory."""
        return ""

    def source(self, name: str) -> str:
        """The stack that a tensor is part of, if it is."""
        return ""

    def unchecked(self, name: str) -> np.ndarray:
        """A tensor that `settle` is yet to compare; a view of the file where it can be one."""
        return self[name]

    def settle(self, names: Sequence[str], array: np.ndarray, digest: str = "") -> None:
        """Compare tensors with what was recorded of them, if anything was.

        Args:
            digest: sha256 (hex) of `array`, which was made of them and may be one of them; empty: not known.
        """


class InMemory(Tensors):
    """The arrays of a mapping."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def tensors_of(arrays: Mapping[str, Any]) -> Tensors:
    """The mapping itself if it knows its tensors, else its arrays as such."""
    return arrays if isinstance(arrays, Tensors) else InMemory(arrays)
