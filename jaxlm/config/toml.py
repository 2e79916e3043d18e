"""The config as a TOML file: read with overrides, checked, written out whole.

A file states only what differs from the defaults. An unknown or ill-typed key is refused with the nearest valid name,
and the resolved tree is written into the run.

    config = load("configs/quickstart.toml", ["train.steps=100", "mesh.fsdp=8"])
    config.model.d_model
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, cast

import tomli_w
from pydantic import TypeAdapter, ValidationError

from jaxlm.config import Config, paths, registry
from jaxlm.errors import UserError, did_you_mean


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides (values in TOML syntax; a bare word is a string).

    `path` may be the name or an alias of a file of `configs/models`: see `registry`. A `mesh` that is a name, in the
    file or as an override, stands for the section of `configs/mesh/NAME.toml`; overrides after it change its keys. The
    file wins over the defaults, overrides win over the file, and the last of them wins.

    Raises:
        UserError: the file is missing or no TOML, a key is unknown, a value has the wrong type or contradicts another.
    """
    path = registry.find(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file", _near_files(path)) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", "name a .toml file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, a number of thousands of digits
        raise UserError(f"{path}: not valid TOML: {error}") from None
    _fill_in_mesh(tree)
    paths.resolve_tree(tree, path)
    for override in overrides:
        _apply(tree, override)
        _fill_in_mesh(tree)
    paths.resolve_tree(tree)
    config = from_dict(tree, where=str(path))
    return config if config.out_dir else dataclasses.replace(config, out_dir=f"runs/{path.stem}")


def from_dict(tree: Mapping[str, Any], where: str = "config") -> Config:
    """Build a `Config` from nested dicts; lists become tuples.

    Raises:
        UserError: one line that names `where`, the key and the nearest valid name.
    """
    _refuse_unknown(tree, Config, where, "")
    try:
        return TypeAdapter(Config).validate_json(
            json.dumps(tree, default=str)
        )  # strict JSON: lists are tuples, nothing is coerced
    except ValidationError as error:
        first = error.errors()[0]
        key = _key_of(first["loc"], tree)
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ValueError):
            raise UserError(f"{where}: {cause}") from None
        raise UserError(f"{where}: {key} = {first['input']!r}: {first['msg'].lower()}") from None


def _key_of(location: Sequence[str | int], tree: Mapping[str, Any]) -> str:
    """The dotted key of a place in a tree: a table of a list by its name, as an override names it."""
    names: list[str] = []
    node: Any = tree
    for part in location:
        if isinstance(node, dict):
            names.append(str(part))
            node = cast(dict[str, Any], node).get(str(part))
        elif isinstance(node, list | tuple) and isinstance(part, int):
            items = cast(Sequence[Any], node)
            node = items[part] if part < len(items) else None  # a place that is missing
            name: Any = cast(dict[str, Any], node).get("name") if isinstance(node, dict) else None
            names += [name] if isinstance(name, str) else []
        # else: the name of a type, one of several that the value may have
    return ".".join(names)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, as `from_dict` takes them."""
    return _lists(dataclasses.asdict(config))


def to_toml(config: Config) -> str:
    """The resolved config as TOML text."""
    return tomli_w.dumps(to_dict(config))


def _apply(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", dotted):
        raise UserError(f"override {override!r} is not of the form section.key=value")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"override {override!r} is not UTF-8")
    paths.refuse_empty(dotted, text)
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text
    if _is_text(dotted) and not isinstance(value, str):  # 2024 and true are names too, as they are written
        value = text
    *sections, key = dotted.split(".")
    node: Any = tree
    for section in sections:
        node = _inner(node, section, override)
    if paths.is_list(node):
        raise UserError(f"override {override!r}: {sections[-1]!r} is a list of tables", "name one and its key")
    node[key] = value


def _inner(node: Any, section: str, override: str) -> Any:
    """The section of a section, or the table of a list of tables."""
    inner = _named(node, section, override) if paths.is_list(node) else node.setdefault(section, {})
    if not (paths.is_table(inner) or paths.is_list(inner)):
        raise UserError(f"override {override!r}: {section!r} is not a section")
    return inner


def _named(tables: list[Any], name: str, override: str) -> dict[str, Any]:
    """The table of a list, such as `[[data.mixture]]`, that has this name."""
    by_name = {table.get("name"): table for table in tables if paths.is_table(table)}
    if name not in by_name:
        raise UserError(f"override {override!r}: there is no {name!r}", did_you_mean(name, filter(None, by_name)))
    return by_name[name]


def _is_text(dotted: str) -> bool:
    """Whether the option takes a text and nothing else."""
    hint: Any = Config
    for name in dotted.split("."):
        hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint is str


def _fill_in_mesh(tree: dict[str, Any]) -> None:
    if isinstance(tree.get("mesh"), str):
        tree["mesh"] = registry.mesh(tree["mesh"])


def _refuse_unknown(tree: Mapping[str, Any], cls: type, where: str, prefix: str) -> None:
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {prefix + key!r}", did_you_mean(key, hints))
        if dataclasses.is_dataclass(hints[key]):
            if not _is_section(value):
                section = prefix + key
                raise UserError(
                    f"{where}: {section!r} is a section, not a value", f"write [{section}] and its keys below"
                )
            _refuse_unknown(value, typing.cast(type, hints[key]), where, f"{prefix}{key}.")
        item = next(iter(typing.get_args(hints[key])), None)  # of a list of tables
        if dataclasses.is_dataclass(item):
            if not _is_sequence(value) or not all(_is_section(table) for table in value):
                raise UserError(f"{where}: {prefix + key!r} is a list of tables", f"write [[{prefix + key}]]")
            for table in value:
                _refuse_unknown(table, typing.cast(type, item), where, f"{prefix}{key}.")


def _is_section(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _lists(value: Any) -> Any:
    if _is_section(value):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if _is_sequence(value) else value


def _near_files(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    return did_you_mean(path.name, names) if names else "check the path"
