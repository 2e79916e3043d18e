"""A run on a Cloud TPU slice: `launch/tpu-vm.sh` or `launch/queued-resource.sh` with other values."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from jaxlm.errors import UserError
from jaxlm.launch.job import IMAGE, WORD, Job, checked, filled

RUNTIMES = {
    "v4": ("tpu-ubuntu2204-base", 2),
    "v5litepod": ("v2-alpha-tpuv5-lite", 1),
    "v5p": ("v2-alpha-tpuv5", 2),
    "v6e": ("v2-alpha-tpuv6e", 1),
}
"""The machine image of each kind, and what accelerator types count of one chip: v5p-64 has 32 chips of two cores."""


@dataclasses.dataclass(frozen=True)
class CloudTpu:
    """What is asked of Cloud TPU."""

    accelerator: str
    """As Cloud TPU calls it: v5p-64, v6e-16."""
    image: str
    zone: str
    project: str
    nfs: str
    """SERVER:/EXPORT, a share (Filestore) that every worker mounts at the storage folder."""
    capacity: Literal["", "spot", "reserved"] = ""


def script(job: Job, asked: CloudTpu, *, queued: bool) -> str:
    """The script.

    Raises:
        UserError: a value is not of its form.
    """
    kind, _, size = checked("--accelerator", asked.accelerator, r"[a-z0-9]+-[1-9]\d*").partition("-")
    if kind not in RUNTIMES:
        raise UserError(f"--accelerator {asked.accelerator}: unknown TPU {kind!r}", f"known: {', '.join(RUNTIMES)}")
    if not job.storage:
        raise UserError("--storage: the path where the share is mounted is missing", "give --storage /mnt/jaxlm")
    runtime, of_chip = RUNTIMES[kind]
    if int(size) % of_chip:
        raise UserError(f"--accelerator {asked.accelerator} counts cores, of which a chip has {of_chip}")
    if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", asked.zone):
        raise UserError(f"--zone {asked.zone!r} is not a zone", "as us-east5-a")
    job = dataclasses.replace(job, devices=job.devices or int(size) // of_chip)
    return filled(
        "queued-resource.sh" if queued else "tpu-vm.sh",
        {
            "name": job.name,
            "project": checked("--project", asked.project, WORD),
            "zone": asked.zone,
            "accelerator": asked.accelerator,
            "runtime": runtime,
            "capacity": [f"--{asked.capacity}"] if asked.capacity else [],
            "image": checked("--image", asked.image, IMAGE),
            "nfs": checked("--nfs", asked.nfs, r"[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*"),
            "storage": job.storage,
            "preflight": job.preflight,
            "train": job.train,
            "restarts": job.restarts,
        },
    )
