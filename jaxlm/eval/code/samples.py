"""Samples read from anybody's file, and records that are appended line by line so that a killed evaluation goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError, did_you_mean
from jaxlm.eval.code.problems import Problem, rows
from jaxlm.eval.code.programs import from_chat

MAX_COMPLETION = 1 << 20


class Sample(NamedTuple):
    """One completion of a problem."""

    task_id: str
    number: int
    """Which sample of its problem."""
    completion: str
    cut_off: bool = False
    """It ended because it may be no longer."""

    @property
    def digest(self) -> str:
        """A few letters that stand for the text."""
        return digest_of(self.completion)


def digest_of(text: str) -> str:
    """A few letters that stand for a text, such as the prompt of a sample."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_samples(path: Path, known: Collection[str]) -> list[Sample]:
    """Read samples in HumanEval's format: `task_id` and `completion` a line. Several of a problem are numbered as they
    come.

    Raises: UserError for an unknown problem, a completion that is no text, or samples written twice with their numbers.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file", "--from names a file of samples")
    samples: list[Sample] = []
    counts: dict[str, int] = {}
    numbers: set[tuple[str, int]] = set()
    for line, row in enumerate(rows(path, task_id=object, completion=object), 1):
        task_id, completion = row["task_id"], row["completion"]
        task_id = str(task_id)
        if task_id not in known:
            hint = did_you_mean(task_id, list(known)[:2000])
            hint = hint if len(hint) < 100 else f"such as {next(iter(known))}"
            raise UserError(f"{path}, line {line}: unknown task_id {task_id[:100]!r}", hint)
        if not isinstance(completion, str):
            raise UserError(f"{path}, line {line}: the completion is no text but {type(completion).__name__}")
        if len(completion) > MAX_COMPLETION:
            raise UserError(f"{path}, line {line}: a completion of {len(completion):,} characters", "at most 1,048,576")
        number = row.get("sample", counts.get(task_id, 0))
        if not isinstance(number, int):
            raise UserError(
                f"{path}, line {line}: sample {number!r} is no number".encode(errors="replace").decode()[:300]
            )
        counts[task_id] = counts.get(task_id, 0) + 1
        if (task_id, number) in numbers:
            raise UserError(f"{path}, line {line}: sample {number} of {task_id} is there twice", "remove one")
        numbers.add((task_id, number))
        samples.append(Sample(task_id, number, completion, bool(row.get("cut_off", False))))
    if not samples:
        raise UserError(f"{path} has no sample", "one JSON object a line: task_id, completion")
    return samples


def from_answers(problems: Sequence[Problem], samples: Sequence[Sample]) -> tuple[list[Problem], list[Sample]]:
    """Take programs out of a chat model's answers. Returns problems whose completions are whole programs, and these."""
    if any(problem.suffix or problem.tests.language != "python" for problem in problems):
        raise UserError("--chat is for tasks that ask for a function in Python", "leave it out")
    table = {problem.task_id: problem for problem in problems}
    programs = [
        sample._replace(completion=from_chat(sample.completion, one.before, one.entry))
        for sample in samples
        for one in [table[sample.task_id]]
    ]
    return [replace(problem, before="", stops=()) for problem in problems], programs


def is_of(record: Mapping[str, object], task_id: str, prompt: str) -> bool:
    """Whether a record is of a problem as it is asked now. Records of before prompts were kept say only which."""
    return record.get("task_id") == task_id and record.get("prompt_digest", digest_of(prompt)) == digest_of(prompt)


class Records:
    """A file of JSON lines to append to. A line that a kill cut short is dropped when the next one is appended."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self.file = path, file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another evaluation writes {path}", "wait for it, or name another --out") from None
        except OSError as error:
            hint = "its file system has no locks; --out names another place"
            raise UserError(f"{path} cannot be locked: {os.strerror(error.errno or 0)}", hint) from None
        file.seek(0)
        data = file.read()
        whole = data.rfind(b"\n") + 1
        self.whole = whole if whole < len(data) else None
        try:
            known: list[Any] = [json.loads(line) for line in data[:whole].splitlines()]
        except ValueError:
            known = [None]
        if not all(isinstance(record, dict) for record in known):
            raise UserError(f"{path} is no file of records", "remove it, or name another --out")
        self.known: list[dict] = known

    def append(self, record: dict) -> None:
        """Add a line. Raises: UserError when the disk is full; what was written stays."""
        line = memoryview((json.dumps(record, ensure_ascii=True) + "\n").encode())
        try:
            if self.whole is not None:
                self.file.truncate(self.whole)
                self.whole = None
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            message = f"{self.path}: {os.strerror(error.errno or 0)}"
            raise UserError(message, "make room; the same command goes on from here") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all. Raises: UserError, where it cannot be written."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        hint = "make room, or name another place by --out; the same command goes on from here"
        raise UserError(f"{path}: {error.strerror}", hint) from None


@contextmanager
def records(path: Path) -> Iterator[Records]:
    """Open a file of records for this evaluation alone. Raises: UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", "--out names another place") from None
    with file:
        yield Records(path, file)
