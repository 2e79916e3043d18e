"""libtpu, by which `jaxlm plan` compiles for TPUs, is silent on a machine that has none.

JAX asks it for devices wherever it is installed, and it prints five lines about a cloud that is not there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
"""Where Linux lists what is on the PCI bus."""
_GOOGLE = "0x1ae0"
NO_CLOUD = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
"""What libtpu would ask a cloud for, of a machine that has no chip."""


@contextlib.contextmanager
def libtpu_silence() -> Iterator[None]:
    """While it lasts, what libtpu looks for is set, unless a device of Google's is on the bus; JAX looks once."""
    vendors = (file.read_text(encoding="ascii").strip() for file in DEVICES.glob("*/vendor"))
    added = {} if _GOOGLE in vendors else {name: x for name, x in NO_CLOUD.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
