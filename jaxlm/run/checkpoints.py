"""Find the checkpoints of a run by their folders; nothing in them is read."""

from __future__ import annotations

import re
from pathlib import Path

from jaxlm.errors import UserError

CHECKPOINTS = "checkpoints"


def checkpoint_steps(run_dir: str | Path) -> list[int]:
    """Steps that have a folder in `run_dir/checkpoints`, oldest first; one that is still written has another name.

    Raises:
        UserError: the folder cannot be read.
    """
    folder = Path(run_dir) / CHECKPOINTS
    try:
        names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def checkpoint_folder(run_dir: str | Path, step: int | None = None) -> Path:
    """The folder of one checkpoint.

    Args:
        step: which one; None: the newest.

    Raises:
        UserError: there is none, or none of that step.
    """
    folder, steps = Path(run_dir) / CHECKPOINTS, checkpoint_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        wanted = "no checkpoint" if step is None else f"no step {step}"
        raise UserError(f"{folder}: {wanted}", f"there are: {', '.join(map(str, steps)) or 'none'}")
    return folder / str(steps[-1] if step is None else step)
