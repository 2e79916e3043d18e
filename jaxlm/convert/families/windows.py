"""Sliding windows in config.json: of every layer (Mistral), or of some (Qwen)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlm import config
from jaxlm.convert.settings import Hf, Setting, refusal, shortest_pattern


def windows(model: config.Model) -> list[int]:
    """The window of each layer, 0 for none."""
    blocks = [model.halves(kind).mixer.window for kind in model.pattern]
    return blocks * model.repeats


def layers(sizes: Sequence[int], block: str = "attention{}+mlp") -> dict[str, Any]:
    """Options of `[model]` for a window in each layer; `{}` in a block is the place of its options."""
    if len(set(sizes)) == 1:
        return {"window": sizes[0], "pattern": [block.format("")]}
    return {"pattern": shortest_pattern([block.format(f"(window={size})" if size else "") for size in sizes])}


def everywhere(default: int | None) -> Setting:
    """`sliding_window` of all layers; null: none. `default` is that of transformers, where the key is absent."""
    return Setting(
        lambda model: {"sliding_window": windows(model)[0] or None},
        lambda hf: layers([hf.get("sliding_window", default) or 0]),
        "sliding_window",
    )


_TYPES = ("full_attention", "sliding_attention")


def _somewhere_out(model: config.Model) -> dict[str, Any]:
    sizes = windows(model)
    full = next((i for i, size in enumerate(sizes) if size), len(sizes))
    return {
        "use_sliding_window": any(sizes),
        "sliding_window": max(sizes) or None,
        "layer_types": [_TYPES[size > 0] for size in sizes],
        **({"max_window_layers": full} if any(sizes) and all(sizes[full:]) else {}),  # transformers 4
    }


def _somewhere_back(hf: Hf) -> dict[str, Any]:
    count, types = hf["num_hidden_layers"], hf.get("layer_types")
    size, used = hf.get("sliding_window", 4096), hf.get("use_sliding_window", False)
    size, first = (size or 0 if used else 0), hf.get("max_window_layers", 28)
    if types is None:
        types = [_TYPES[size > 0 and i >= first] for i in range(count)]
    if len(types) != count or not set(types) <= set(_TYPES):
        raise refusal("layer_types", types)
    if not size and _TYPES[1] in types:
        raise ValueError("layer_types has sliding_attention, but there is no sliding_window that is used")
    return layers([size if kind == _TYPES[1] else 0 for kind in types])


SOMEWHERE = Setting(_somewhere_out, _somewhere_back, "use_sliding_window")
"""`use_sliding_window`, `sliding_window` and `layer_types`, or `max_window_layers`: the layers before the first
window."""
