"""What has a name: `configs/models/*.toml` and `configs/mesh/*.toml`, which come with the package.

    find("quickstart")   # configs/quickstart.toml
    find("dense-134m")   # configs/models/dense-134m.toml: the name carries the counted parameters
    find("s0-100m")      # the same by the name that its source gave it
    mesh("zero3")        # the section that configs/mesh/zero3.toml holds

Imports neither jax nor torch.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from jaxlm.config.shipped import shipped
from jaxlm.errors import UserError, did_you_mean

FOLDER = shipped("configs") / "models"
MESHES = FOLDER.with_name("mesh")
SAMPLING = FOLDER.with_name("sampling")


def find(name: str | Path) -> Path:
    """The file of a config: a path as it is, or the name or alias of a named configuration.

    Raises:
        UserError: `name` is no path and no such configuration is known.
    """
    path, name = Path(name), str(name)
    if path.exists() or name.endswith(".toml") or path.name != name:
        return path
    for folder in (FOLDER, FOLDER.parent):  # quickstart and showcase lie above the models
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = entries()
    for file, aliases in known.items():
        if name in aliases:
            return file
    names = [file.stem for file in known] + [alias for aliases in known.values() for alias in aliases]
    if not names:
        raise UserError(f"{name}: no such config file", f"there are no named configurations at {FOLDER}")
    hint = did_you_mean(name, names)
    raise UserError(
        f"{name}: no such config file, nor a named configuration",
        hint if hint.startswith("did") else "`jaxlm info` lists the names",
    )


def entries() -> dict[Path, tuple[str, ...]]:
    """Every named configuration and its aliases, by name."""
    found: dict[Path, tuple[str, ...]] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        found[path] = tuple(tomllib.loads(path.read_text(encoding="utf-8")).get("aliases", ()))
    return found


def mesh(name: str) -> dict[str, Any]:
    """The section `[mesh]` of a preset, as plain dicts.

    Raises:
        UserError: there is no preset of that name.
    """
    path = MESHES / f"{name}.toml"
    names = [file.stem for file in MESHES.glob("*.toml")]
    if name not in names:
        raise UserError(f"mesh = {name!r}: no such preset", did_you_mean(name, names) if names else f"see {MESHES}")
    return tomllib.loads(path.read_text(encoding="utf-8"))["mesh"]


def sampling(name: str) -> dict[str, float]:
    """The options of a preset of sampling, `configs/sampling/NAME.toml`.

    Raises:
        UserError: there is no preset of that name.
    """
    path = SAMPLING / f"{name}.toml"
    names = sorted(file.stem for file in SAMPLING.glob("*.toml"))
    if name not in names:
        raise UserError(f"{name!r}: no such preset of sampling", did_you_mean(name, names))
    return tomllib.loads(path.read_text(encoding="utf-8"))
