"""Prompts begin alike: what rows had after each chunk of a prompt is kept, and put back when a prompt begins the same.

A chunk's name is a chained hash: of the model, the tokenizer and the tenant in the first link, then of the name before
and the chunk's ids. So a name stands for the whole text up to its end, and tenants never meet.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass
class PrefixCounts:
    """What the table has done."""

    hits: int = 0
    """Chunks put back."""
    misses: int = 0
    """Chunks asked for that were not there."""
    evicted: int = 0
    bytes: int = 0


class PrefixTable:
    """Kept chunks by name, the least recently used leaving first.

    Args:
        chunk: ids of a chunk.
        memory: bytes that all entries together may take; 0 keeps nothing.
        fingerprint: of the model and the tokenizer.
    """

    def __init__(self, chunk: int, memory: int, fingerprint: str) -> None:
        self.chunk, self.memory, self.fingerprint = chunk, memory, fingerprint
        self.counts = PrefixCounts()
        self._entries: collections.OrderedDict[bytes, tuple[Any, int]] = collections.OrderedDict()

    def names(self, ids: Sequence[int], tenant: str) -> list[bytes]:
        """Names of the whole chunks of a text."""
        name = hashlib.sha256(f"{self.fingerprint}\0{tenant}".encode()).digest()
        names = []
        for start in range(0, len(ids) - self.chunk + 1, self.chunk):
            link = np.asarray(ids[start : start + self.chunk], np.int64).tobytes()
            name = hashlib.sha256(name + link).digest()
            names.append(name)
        return names

    def find(self, names: Sequence[bytes]) -> list[Any]:
        """What is kept of the chunks with these names, from the first on without a gap."""
        found = []
        for name in names:
            if name not in self._entries:
                break
            self._entries.move_to_end(name)
            found.append(self._entries[name][0])
        self.counts.hits += len(found)
        self.counts.misses += len(names) - len(found)
        return found

    def put(self, name: bytes, kept: Any, size: int) -> None:
        """Keep a chunk of `size` bytes, if it fits at all."""
        if name in self._entries or size > self.memory:
            return
        self._entries[name] = (kept, size)
        self.counts.bytes += size
        while self.counts.bytes > self.memory:
            _, (_, freed) = self._entries.popitem(last=False)
            self.counts.bytes -= freed
            self.counts.evicted += 1

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries

    def clear(self) -> None:
        """Forget everything, as after a change of weights."""
        self._entries.clear()
        self.counts.bytes = 0
