"""A problem of a code task, and the files that problems come from."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError
from jaxlm.sandbox import Tests

NO_TESTS = Tests("", ("nothing",))
"""Of a problem whose answer no program judges."""


@dataclass(frozen=True)
class Problem:
    """One problem: what the model reads, how its text becomes a program, and the tests."""

    task_id: str
    prompt: str
    """What the model continues."""
    tests: Tests
    entry: str
    """The function that the tests call."""
    reference: str = ""
    """A whole program that is right; empty where the set has none."""
    before: str = ""
    """Text of the program in front of the completion."""
    after: str = ""
    """Text of the program behind the completion."""
    suffix: str = ""
    """Infilling: what the model sees behind the gap."""
    stops: tuple[str, ...] = ()
    """Strings before which a completion ends."""
    always_stop: bool = False
    """The strings are part of the set's format, so that samples of others end there too."""
    challenge: Tests | None = None
    """More tests, for a second number."""
    question: str = ""
    """What a chat model is asked instead; empty where a task is for base models only."""

    def program(self, completion: str) -> str:
        """The program that a completion makes, byte for byte."""
        return f"{self.before}{completion}{self.after}"


def asked(question: str, start: str = "") -> str:
    """The prompt of a question for a model without a chat template, as in OctoPack (Muennighoff et al. 2023)."""
    return f"Question: {question}\n\nAnswer:\n{start}"


def find_file(path: str | Path | None, *names: str) -> Path:
    """Find the file of a set: the path given, or the first of some names under `JAXLM_DATA`. Raises: UserError."""
    if path:
        if not Path(path).is_file():
            raise UserError(f"{path} is no file", "--data names the file of the set")
        return Path(path)
    root = os.environ.get("JAXLM_DATA")
    if not root:
        raise UserError(f"JAXLM_DATA is not set, so {names[0]} is not found", "set it, or name the file by --data")
    for name in names:
        if (file := Path(root) / name).is_file():
            return file
    raise UserError(f"{Path(root) / names[0]} is missing", "put the set there, or name the file by --data")


def rows(path: Path, *texts: str, optional: Collection[str] = (), **others: type) -> Iterator[dict]:
    """Read the rows of a JSONL file, compressed or not.

    Args:
        path: the file.
        texts: keys that each row must have, with a text.
        optional: those of `others` that a row may lack, or have as null.
        others: more keys, with values of these types; a list is one of texts.

    Raises: UserError.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                for key, kind in {**dict.fromkeys(texts, str), **others}.items():
                    if isinstance(row, dict) and key in optional and row.get(key) is None:
                        continue
                    if not isinstance(row, dict) or key not in row:
                        raise UserError(f"{path}, line {number}: no key {key!r}", "is this the file of the set?")
                    if found := _other_type(row[key], kind):
                        raise UserError(f"{path}, line {number}: {key!r} is {found}", "is this the file of the set?")
                yield row
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}, line {max(number, 1)}: {error}", "the file must be JSON, one row a line") from None


def _other_type(value: Any, kind: type) -> str:
    """Say of which other type a value is, or nothing. A list must hold texts."""
    if not isinstance(value, kind):
        return f"{type(value).__name__} and not {kind.__name__}"
    wrong = [type(item).__name__ for item in value if not isinstance(item, str)] if kind is list else []
    return f"list of {wrong[0]} and not list of str" if wrong else ""
