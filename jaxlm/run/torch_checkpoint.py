"""A checkpoint of torch_ref on disk: three files, of which the record knows the sha256 of all.

    checkpoints/STEP/  model.safetensors  optimizer.safetensors  run.json

torch_ref writes and reads it, and jaxlm does when it carries a run over; so it imports neither jax nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError

FORMAT = 1
MODEL, OPTIMIZER, RUN = "model.safetensors", "optimizer.safetensors", "run.json"
MOMENTS, COUNT = ("exp_avg", "exp_avg_sq"), "step"
"""`OPTIMIZER` holds `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME` of each parameter: torch's own words."""


def write_record(folder: Path, state: Mapping[str, int], run: Mapping[str, Any], validation_loss: float | None) -> None:
    """Write `run.json` beside both files of tensors: the counters `state`, the loop's record, and the checksums."""
    record = {"format": FORMAT, "state": dict(state), "validation_loss": validation_loss, "run": dict(run)}
    record["sha256"] = _checksums(folder, record)
    (folder / RUN).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """`run.json` without the checksums, after comparing every byte of the checkpoint with them.

    Raises:
        UserError: the checkpoint is of another version of this format.
        ValueError, KeyError, TypeError, OSError: it is truncated, altered or not there.
    """
    record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {record['format']}, this version reads {FORMAT}")
    expected = record.pop("sha256")
    for name, found in _checksums(folder, record).items():
        if found != expected[name]:
            raise ValueError(f"the checksum of {name} differs")
    return record


def _checksums(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of both files of tensors, and that of the record."""
    found = {RUN: hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}
    for name in (MODEL, OPTIMIZER):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
