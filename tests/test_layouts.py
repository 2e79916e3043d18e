"""Where every tensor of the named configurations lies: golden files in tests/layouts, one a configuration.

A line is `shape split-over -> what a device holds`, layers stacked. `python -m tests.test_layouts` rewrites the files;
read what has moved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config import registry, toml
from jaxlm.errors import UserError
from jaxlm.plan.sharding import describe

FOLDER = Path(__file__).parent / "layouts"
CONFIGS = sorted(path.stem for path in registry.entries())
MANY = ("dense-69b", "hybrid-2.18b", "mamba-1.52b", "moe-812m-a472m")
"""Laid out by every preset; the others by one, and those with experts by two."""


def cases(name: str) -> list[tuple[str, int, int]]:
    """Preset, devices and slices of each layout of a configuration."""
    presets = ["fsdp", "fsdp-tensor8", *(["fsdp-expert8"] if name.startswith("moe") else [])]
    if name in MANY:
        presets = sorted(path.stem for path in registry.MESHES.glob("*.toml"))
    return [(preset, 64, 4 if preset == "multislice" else 1) for preset in presets]


def layouts(name: str, *overrides: str) -> dict[str, Any]:
    """The layouts of a configuration, as they are kept; a refused one is its message."""
    return {
        f"{preset}, {devices} devices in {slices}": layout(name, preset, devices, slices, *overrides)
        for preset, devices, slices in cases(name)
    }


def layout(name: str, preset: str, devices: int, slices: int, *overrides: str) -> Any:
    try:
        found = describe(toml.load(name, [f"mesh={preset}", *overrides]), devices, slices)
    except UserError as error:
        return str(error)
    rows = {leaf.name: leaf for leaf in found.leaves if leaf.kind == "parameter"}
    rows |= {f"optimiser of {leaf.of}": leaf for leaf in found.moved}
    lines = {key: f"{shown(leaf.shape)} {leaf.split} -> {shown(leaf.local_shape)}" for key, leaf in rows.items()}
    return {"bytes": {kind: found.bytes(kind) for kind in ("parameter", "optimizer")}, **lines}


def shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each tensor that moved, by layout and name."""
    found = []
    for case in was | now:
        old, new = was.get(case), now.get(case)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            found += [f"{case}: was {old}, is {new}"] if old != new else []
            continue
        found += [
            f"{case}: {key}: was {old.get(key)}, is {new.get(key)}" for key in old | new if old.get(key) != new.get(key)
        ]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_lies_where_it_lay(name: str) -> None:
    kept = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    moved = differences(kept, layouts(name))
    assert not moved, "\n".join(moved)


def test_every_golden_file_has_its_configuration() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == CONFIGS


def test_a_tensor_that_moved_is_named() -> None:
    kept = json.loads((FOLDER / "dense-4.86m.json").read_text(encoding="utf-8"))
    moved = differences(kept, layouts("dense-4.86m", "mesh.rules.kv_heads=[]", "mesh.rules.vocab=['tensor','context']"))
    case = "fsdp-tensor8, 64 devices in 1: "
    assert moved == [
        case + "bytes: was {'parameter': 310272, 'optimizer': 620552}, is {'parameter': 654336, 'optimizer': 1308680}",
        *(
            case + f"layers.slot_0.mixer.{name}.kernel: "
            "was 6x256x8x32 embed/fsdp kv_heads/tensor -> 6x32x1x32, is 6x256x8x32 embed/fsdp -> 6x32x8x32"
            for name in ("k_proj", "v_proj")
        ),
    ]
    refused = differences(kept, layouts("dense-4.86m", "model.vocab_size=257"))[-1]
    assert refused.startswith(case + "was {") and "is embed.embedding: vocab of 257 does not divide" in refused


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in CONFIGS:
        (FOLDER / f"{name}.json").write_text(json.dumps(layouts(name), indent=1) + "\n", encoding="utf-8")
