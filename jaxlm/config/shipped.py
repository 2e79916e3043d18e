"""Find the folders that come with the package: `configs` and `launch`."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def shipped(folder: str) -> Path:
    """A folder that a wheel has inside, as `jaxlm/shipped/FOLDER`, and a checkout beside the package."""
    package = Path(str(importlib.resources.files("jaxlm")))
    inside = package / "shipped" / folder
    return inside if inside.is_dir() else package.parent / folder
