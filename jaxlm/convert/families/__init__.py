"""Public weight layouts: one file each, which holds its rows and how its config.json says what our config says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from jaxlm.convert import FAMILY_NAMES
from jaxlm.convert.family import Family

FAMILIES: Mapping[str, Family] = {
    name: importlib.import_module(f"jaxlm.convert.families.{name}").FAMILY for name in FAMILY_NAMES
}
"""`model_type` of config.json to the family."""

_MLA = "its attention keeps a latent in place of keys and values (MLA), which jaxlm cannot express yet"
REFUSED: Mapping[str, str] = {"deepseek_v2": _MLA, "deepseek_v3": _MLA}
"""`model_type` of layouts that jaxlm knows and cannot compute, and why."""
