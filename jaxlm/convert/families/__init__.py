"""Public weight layouts: one file each, which holds its rows and how its config.json says what our config says."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from jaxlm.convert.families import llama

FAMILIES: Mapping[str, ModuleType] = {"llama": llama}
"""`model_type` of config.json to the family."""
