"""libtpu, by which `jaxlm plan` compiles for TPUs, is silent on a machine that has none.

JAX asks it for devices wherever it is installed, and it prints five lines about a cloud that is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
"""Where Linux lists what is on the PCI bus."""
_GOOGLE = "0x1ae0"
NO_CLOUD = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
"""What libtpu would ask a cloud for, of a machine that has no chip."""


def silence_libtpu() -> None:
    """Set what libtpu looks for, unless a device of Google's is on the bus; call before JAX looks for devices."""
    vendors = (file.read_text(encoding="ascii").strip() for file in DEVICES.glob("*/vendor"))
    if _GOOGLE not in vendors:
        for name, value in NO_CLOUD.items():
            os.environ.setdefault(name, value)
