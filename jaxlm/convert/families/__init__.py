"""Public weight layouts: one file each, which holds its rows and how its config.json says what our config says."""

from __future__ import annotations

from collections.abc import Mapping

from jaxlm.convert.families import jamba, llama, mamba, mamba2
from jaxlm.convert.family import Family

FAMILIES: Mapping[str, Family] = {one.name: one for one in (llama.FAMILY, mamba.FAMILY, mamba2.FAMILY, jamba.FAMILY)}
"""`model_type` of config.json to the family."""
