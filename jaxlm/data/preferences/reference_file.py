"""What a reference thinks of every answer, computed once and kept in a file of the cache.

    CACHE_DIR/reference/DIGEST.safetensors    train [2 x pairs]  held_out_0 [2 x pairs] ...

The name of a file follows from the facts that decide its numbers: the sha256 of the reference and of the data, and the
numerics. The file states them again, beside the sha256 of its numbers; one that states others or is damaged is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.errors import UserError

FOLDER, FACTS, NUMBERS = "reference", "facts", "sha256"


@dataclasses.dataclass(frozen=True)
class ReferenceFile:
    """A file of log-probabilities and what decides them."""

    path: Path
    facts: Mapping[str, str]

    @classmethod
    def of(cls, cache_dir: Path, facts: Mapping[str, str]) -> ReferenceFile:
        """The file of these facts in a cache."""
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        return cls(cache_dir / FOLDER / f"{digest[:32]}.safetensors", facts)

    def read(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray] | None:
        """Its arrays, of which there must be one of each size; None: there is no such file yet.

        Raises:
            UserError: it is damaged, or was made of another reference or of other data.
        """
        if not self.path.exists():
            return None
        again = "delete it: it is computed again"
        try:
            with safe_open(self.path, framework="numpy") as file:
                stated = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            facts = json.loads(stated.get(FACTS, "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: damaged: {str(error).splitlines()[0]}", again) from None
        for name, value in self.facts.items():
            if facts.get(name) != value:
                before = str(facts.get(name))
                raise UserError(f"{self.path}: made with {name} {before[:16]}, and this run has {value[:16]}", again)
        if stated.get(NUMBERS) != _digest(arrays) or {n: x.size for n, x in arrays.items()} != dict(sizes):
            raise UserError(f"{self.path}: damaged: its numbers are not those that were written", again)
        return arrays

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays; the file appears whole.

        Raises:
            UserError: the folder cannot be written.
        """
        stated = {FACTS: json.dumps(dict(self.facts), sort_keys=True), NUMBERS: _digest(arrays)}
        temporary = self.path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(arrays), temporary, stated)
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self.path}: cannot be written: {error}", "set data.cache_dir to another folder"
            ) from None


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()
