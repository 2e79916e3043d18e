"""The files beside a tokenizer.json that decide about ids too, read as transformers reads them.

tokenizer_config.json     special tokens (`added_tokens_decoder`), `eos_token`, `pad_token`
special_tokens_map.json   `eos_token`, `pad_token`, where the former has none
added_tokens.json         further tokens and their ids
generation_config.json    `eos_token_id`, one or a list; else that of config.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError

_LARGEST = 2**26  # bytes
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Beside(NamedTuple):
    """What lies beside a tokenizer.json: tokens to add in this order, special words, and ids that end a text."""

    added: tuple[tuple[str, dict[str, bool]], ...] = ()
    eos: str = ""
    pad: str = ""
    ends: tuple[int, ...] = ()


def read_beside(folder: Path) -> Beside:
    """What the files of a folder say; nothing where there are none.

    Raises:
        UserError: a file is no JSON object, or it cannot be read.
    """
    settings, words = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
    added: dict[int, tuple[str, dict[str, bool]]] = {}
    for word, number in _read(folder / "added_tokens.json").items():
        if isinstance(number, int):
            added[number] = (word, {"normalized": False, "special": True})
    decoder = settings.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, Mapping) else ():
        if str(number).isdecimal() and isinstance(token, Mapping) and isinstance(token.get("content"), str):
            flags = {name: token[name] for name in _FLAGS if isinstance(token.get(name), bool)}
            added[int(number)] = (token["content"], flags)
    eos, pad = (_word(settings.get(key)) or _word(words.get(key)) for key in ("eos_token", "pad_token"))
    ends = end_ids(_read(folder / "generation_config.json")) or end_ids(_read(folder / "config.json"))
    return Beside(tuple(added[number] for number in sorted(added) if added[number][0]), eos, pad, ends)


def end_ids(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of `eos_token_id`, which may be one or a list."""
    ids = settings.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    return tuple(token for token in listed if isinstance(token, int) and not isinstance(token, bool) and token >= 0)


def _word(token: Any) -> str:
    """The spelling of a special token, which is a string or a table."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else ""


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return {}
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a JSON object")
    return content
