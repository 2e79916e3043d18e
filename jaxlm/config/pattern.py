"""A block as it is written in `model.pattern`: `"attention(window=64)+mlp"` split into names and options."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from typing import Any, NamedTuple

from jaxlm.config.model_parts import Mamba, MoE, require
from jaxlm.errors import did_you_mean

_ATTENTION = (
    "n_heads",
    "n_kv_heads",
    "head_dim",
    "qk_norm",
    "positions",
    "rope_theta",
    "rotary_fraction",
    "window",
    "keep_first",
    "sink_logits",
    "sink_tokens",
    "softcap",
)
FIELDS = {section: tuple(field.name for field in dataclasses.fields(section)) for section in (MoE, Mamba)}
MIXERS = {"attention": _ATTENTION, "mamba": FIELDS[Mamba], "mamba2": FIELDS[Mamba]}
"""Token mixers, and the options that a block may set for its own."""
FFNS = {"mlp": ("d_ff", "activation"), "moe": (*FIELDS[MoE], "activation")}
"""Channel mixers, and the options that a block may set for its own."""


class ParsedBlock(NamedTuple):
    """A block as it is written."""

    mixer: str
    mixer_options: dict[str, Any]
    ffn: str
    ffn_options: dict[str, Any]


def parse_block(kind: str) -> ParsedBlock:
    """Split `"attention(window=64)+mlp"` into names and options. The feed-forward may be left out."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*?)\))?\s*(?:\+\s*(\w+)\s*(?:\((.*?)\))?)?\s*", kind)
    require(match is not None, f"model.pattern: {kind!r} is not of the form MIXER(key=value)+FFN(key=value)")
    assert match is not None
    mixer, mixer_text, ffn, ffn_text = match.groups(default="")
    for half, known, what in ((mixer, MIXERS, "mixer"), (ffn, {"": (), **FFNS}, "feed-forward")):
        if half not in known:
            require(
                False, f"model.pattern: unknown {what} {half!r} in {kind!r}", did_you_mean(half, filter(None, known))
            )
    return ParsedBlock(
        mixer,
        _options(kind, mixer_text, MIXERS[mixer]),
        ffn,
        _options(kind, ffn_text, FFNS[ffn] if ffn else ()),
    )


def _options(kind: str, text: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (word.strip() for word in part.partition("="))
        require(bool(equals), f"model.pattern: {part!r} in {kind!r} is not of the form key=value")
        if key not in allowed:
            require(False, f"model.pattern: unknown option {key!r} in {kind!r}", did_you_mean(key, allowed))
        try:
            found[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found
