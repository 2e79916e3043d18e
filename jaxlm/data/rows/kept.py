"""Plans that are kept on disk beside the shards they are of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlm.processes.file_lock import exclusive


def kept_beside(folder: Path | None) -> Callable[[str, Callable[[], np.ndarray]], np.ndarray] | None:
    """Keeps plans as `.npy` files in the folder of a shard; several processes make each of them once."""
    if folder is None:
        return None

    def remember(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        path = folder / "plans" / f"{name}.npy"
        if (kept := _read(path)) is not None:
            return kept
        with exclusive(path):
            if (kept := _read(path)) is not None:
                return kept
            made = make()
            temporary = path.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, made, allow_pickle=False)
            temporary.replace(path)
            return made

    return remember


def _read(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
