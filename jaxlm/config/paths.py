"""Every path of a config, by one function: `~` and variables are filled in, empty and remote paths are refused.

A relative path is taken from the current folder. One that a file names and that is not there is looked for beside the
file. A run that was moved is the one in whose folder its config lies.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from jaxlm.config.run import Config
from jaxlm.errors import UserError

OUTPUTS = ("out_dir", "data.cache_dir", "distill.cache")
INPUTS = (
    *("data.source", "data.validation_source", "data.curriculum.scores", "tokenizer.path"),
    *("train.init_from", "rl.value_from", "preference.reference", "distill.teacher"),
)
"""Options that name files to read; `data.source` and `train.init_from` may be the name of a data set or model."""

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")


def resolve_tree(tree: dict[str, Any], file: Path | None = None) -> None:
    """Resolve the paths of a config that is still nested dicts, in place; `file` is where they were written.

    Raises:
        UserError: see `resolve`.
    """
    for key in (*OUTPUTS, *INPUTS):
        *sections, name = key.split(".")
        table: Any = tree
        for section in sections:
            table = table.get(section, {}) if is_table(table) else {}
        if is_table(table) and name in table:
            table[name] = _resolved(table[name], key, file if key in INPUTS else None)
    data = tree.get("data")
    mixture = data.get("mixture", ()) if is_table(data) else ()
    for table in mixture if is_list(mixture) else ():
        if is_table(table) and "source" in table:
            table["source"] = _resolved(table["source"], f"data.mixture.{table.get('name', '')}.source", file)


def resolve(value: str, key: str, file: Path | None = None) -> str:
    """A path as the user means it; `""` stays, which is how an option says none.

    Raises:
        UserError: it names a variable that is not set or a user that is not known, it lies on another machine, or it
            has characters that no path has.
    """
    if not value.isprintable():
        raise UserError(f"{key} = {value!r} has characters that no path should have")
    expanded = os.path.expanduser(value)
    if expanded == value and value.startswith("~") and not os.path.exists(value):
        raise UserError(f"{key} = {value!r}: there is no such user", "write ./~ for a folder of this name")
    if not os.path.exists(expanded):
        expanded = _VARIABLE.sub(lambda found: _variable(found, key, value), expanded)
    if _REMOTE.match(expanded) and not os.path.exists(expanded):
        hint = "mount it and name the folder; a data set or model of the Hugging Face hub is written owner/name"
        raise UserError(f"{key} = {value!r} is not a path of this machine", hint)
    if file is not None and expanded and not os.path.isabs(expanded) and not os.path.exists(expanded):
        beside = file.parent / expanded
        return str(beside) if beside.exists() else expanded
    return expanded


def refuse_empty(key: str, text: str) -> None:
    """Refuse an override such as `data.source=$UNSET`, which the shell hands on without a value.

    Raises:
        UserError: the option is a path and its text is empty.
    """
    if key in (*OUTPUTS, *INPUTS) and not text.strip():
        raise UserError(f"{key} is empty", f"is a variable not set? To have none, write {key}='\"\"'")


def of_moved_run(config: Config, file: Path, overridden: Iterable[str]) -> Config:
    """The config with the folder in which it lies as `out_dir`, when that is a run and `out_dir` has none.

    Raises:
        UserError: both folders hold a run, so either could be meant.
    """
    here, named = file.absolute().parent, Path(config.out_dir)
    if "out_dir" in overridden or not (here / "checkpoints").is_dir() or named.resolve() == here.resolve():
        return config
    if (named / "checkpoints").is_dir():
        hint = f"name one: out_dir={here} or out_dir={named.absolute()}"
        raise UserError(f"{file} lies in a run, and its out_dir = {config.out_dir!r} is another run", hint)
    return dataclasses.replace(config, out_dir=str(file.parent))


def is_table(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value of a TOML file is a table."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value of a TOML file is a list."""
    return isinstance(value, list)


def _resolved(value: Any, key: str, file: Path | None) -> Any:
    if isinstance(value, str):
        return resolve(value, key, file)
    return [_resolved(one, key, file) for one in value] if is_list(value) else value


def _variable(found: re.Match[str], key: str, value: str) -> str:
    name = found[1] if found[1] is not None else found[2]
    if not os.environ.get(name):
        raise UserError(f"{key} = {value!r}: the variable {name} is not set")
    return os.environ[name]
