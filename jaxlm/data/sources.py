"""The corpus as a stream of documents in a fixed order, each on the training or on the validation side.

What a document is, `readers` tells; or it is a whole repository (`data.unit`). Sides are chosen by a hash of the file
name (of the text, for a row, so that copies of a row never lie on both sides). A document that is the whole corpus is
cut instead: its end is the validation part.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import itertools
import json
import os
import re
import stat
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlm.config import Data
from jaxlm.data import repository
from jaxlm.data.readers import RECORDS, Document, File, Reading, Source
from jaxlm.errors import UserError, did_you_mean
from jaxlm.text.languages import LANGUAGES

Side = Literal["train", "validation"]

_NOT_CORPUS = frozenset({"site-packages", "dist-packages", "__pycache__"})
_NOT_STDLIB = _NOT_CORPUS | {"test", "tests", "idle_test", "encodings", "pydoc_data"}


def open_source(where: str, data: Data) -> Source:
    """List the files of `"stdlib"`, a file, a folder or a Hugging Face dataset (`owner/name`, or `owner/name:config`).

    In a folder, hidden files, links and anything that is not a plain file are left out, so nothing outside it is read.

    Raises:
        UserError: there is no such thing, or it holds no file to read.
    """
    for spoken in data.languages:
        if spoken not in LANGUAGES:
            raise UserError(f"data.languages: {spoken!r} is unknown", did_you_mean(spoken, LANGUAGES))
    value = data.curriculum.by if data.curriculum.by not in ("", "length", "compression", "loss") else ""
    reading = Reading(data.text_key, data.template, data.row_files, data.languages, value, data.max_bad_rows)
    if not where.strip():
        raise UserError("data.source is empty", "name a file, a folder or a data set")
    skipped: dict[str, str] = {}
    if where == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return Source(where, tuple(_walk(root, (".py",), skipped, _NOT_STDLIB)), reading)
    path = Path(where).expanduser()
    if path.is_dir():
        how = (path, data.extensions, skipped)
        files = tuple(_tracked(*how) if data.gitignore else _walk(*how))
        if not files:
            endings = f" that ends in {', '.join(data.extensions)}" if data.extensions else ""
            links = ", links are not followed" if any(one.is_symlink() for one in path.iterdir()) else ""
            raise UserError(
                f"{where}: the folder has no file{endings}{links}", "data.source and data.extensions choose the files"
            )
        return Source(where, files, reading, skipped=skipped)
    if path.is_file():
        return Source(where, (_file(path.name, path, path.stat()),), reading, alone=True)
    if glob.has_magic(where):
        matched = sorted(Path(one) for one in glob.glob(str(path), recursive=True) if Path(one).is_file())
        if not matched:
            raise UserError(f"data.source = {where!r}: no file matches", "check the pattern")
        return Source(where, tuple(_file(str(one), one, one.stat()) for one in matched), reading)
    return _hugging_face(where, reading)


def _tracked(root: Path, extensions: tuple[str, ...], skipped: dict[str, str]) -> list[File]:
    """The files of a git working tree, without those that `.gitignore` leaves out."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, timeout=600).stdout
    except (OSError, subprocess.SubprocessError) as error:
        stderr = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip() or str(error)
        raise UserError(f"{root}: git cannot list it: {stderr.splitlines()[0]}", "data.gitignore = false") from None
    names = {name for name in os.fsdecode(listed).split("\0") if name}
    return [file for file in _walk(root, extensions, skipped, frozenset({"__pycache__"})) if file.name in names]


def _walk(
    root: Path, extensions: tuple[str, ...], skipped: dict[str, str], without: frozenset[str] = _NOT_CORPUS
) -> list[File]:
    """The files below a folder, by name; a folder in it that cannot be listed goes into `skipped`."""
    found: list[File] = []
    folders = [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in without or entry.is_symlink():
                        continue
                    if entry.is_dir():
                        folders.append((f"{prefix}{entry.name}/", entry.path))
                    elif entry.name.endswith(extensions or "") and stat.S_ISREG((info := entry.stat()).st_mode):
                        found.append(_file(prefix + entry.name, Path(entry.path), info))
        except OSError as error:
            if not prefix:
                raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
            skipped[prefix] = f"cannot be listed: {error.strerror}"
    return sorted(found)


def _file(name: str, path: Path, info: os.stat_result) -> File:
    return File(name, path, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _hugging_face(where: str, reading: Reading) -> Source:
    text_key = reading.text_key
    missing = f"data.source = {where!r}: no such file or folder"
    name, _, subset = where.partition(":")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or name.endswith((".txt", ".md", ".py", *RECORDS)):
        raise UserError(missing, "check the path")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(missing, "check the path; for a Hugging Face dataset: pip install 'jaxlm[datasets]'")
    import datasets  # pyright: ignore[reportMissingImports]

    try:
        dataset = datasets.load_dataset(name, subset or None, split="train")
    except Exception as error:  # whatever the network, the hub or the loading script raises
        raise UserError(f"{missing}, nor a Hugging Face dataset: {str(error).splitlines()[0]}") from error
    if not reading.template and text_key not in dataset.column_names:
        raise UserError(
            f"{where}: no column {text_key!r} (data.text_key)", did_you_mean(text_key, dataset.column_names)
        )
    return Source(where, (), reading, alone=True, dataset=dataset)


class Documents:
    """The corpus of `[data]`: an iterable of (side, document), the same on every run.

    Raises:
        UserError: repositories are asked for, and a source has rows alone; or see `open_source`. While iterating, when
            no document is left for training, or a source cannot be read.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self.where = data.sources
        self._main = [open_source(name, data) for name in data.sources]
        self._held_out = [open_source(data.validation_source, data)] if data.validation_source else []
        for source in self._sources if data.unit == "repository" else []:
            if source.rows_only:
                message = f'data.unit = "repository": {source.where} holds rows, and a repository is a folder of files'
                raise UserError(message, 'name a folder, or set data.unit = "document"')

    @property
    def size(self) -> int:
        """Bytes of all files, roughly what there is to read."""
        return sum(file.size for source in self._sources for file in source.files)

    @property
    def skipped(self) -> dict[str, str]:
        """Name to reason of what was left out so far."""
        return {name: reason for source in self._sources for name, reason in source.skipped.items()}

    @property
    def marked(self) -> bool:
        """Whether special tokens stand within the documents."""
        return self._data.unit == "repository"

    def identity(self) -> str:
        """sha256 of the sources' identities and the options that choose and cut documents."""
        data = self._data
        options: list[Any] = [data.text_key, data.validation_fraction, bool(data.validation_source), data.max_bytes]
        reading = self._main[0].reading._replace(text_key="text", max_bad_rows=0)
        if reading != Reading() or data.unit != "document":
            options += [*reading, data.unit, data.repository.without_name]
        content = json.dumps([2, options, *(source.identity() for source in self._sources)])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def __iter__(self) -> Iterator[tuple[Side, Document]]:
        train = 0
        for side, document in self._sides():
            train += side == "train"
            yield side, document
        if not train:
            raise UserError(f"data.source = {self._data.source!r}: the corpus is empty{_example(self.skipped)}")

    @property
    def _sources(self) -> list[Source]:
        return [*self._main, *self._held_out]

    def _sides(self) -> Iterator[tuple[Side, Document]]:
        if self._held_out:
            for document in self._capped(self._main):
                yield "train", document
            for document in self._capped(self._held_out):
                yield "validation", document
            return
        fraction = self._data.validation_fraction
        few = self._keys_on_one_side() if fraction else set()
        smallest = min(few, key=_uniform, default=None)
        for document in self._capped(self._main):
            if len(few) == 1:
                yield from self._cut(document)
            elif document.key == smallest if few else _uniform(document.key) < fraction:
                yield "validation", document
            else:
                yield "train", document

    def _keys_on_one_side(self) -> set[str]:
        """All keys of a corpus so small that the hash would leave one side empty; no keys otherwise."""
        keys: set[str] = set()
        sides: set[bool] = set()
        for document in self._capped(self._main):
            keys.add(document.key)
            sides.add(_uniform(document.key) < self._data.validation_fraction)
            if len(sides) == 2:
                return set()
        return keys

    def _cut(self, document: Document) -> Iterator[tuple[Side, Document]]:
        text = document.text
        at = round(len(text) * (1 - self._data.validation_fraction))
        at = text.rfind("\n", 0, at) + 1 or at
        if at:
            yield "train", document._replace(text=text[:at])
        if at < len(text):
            yield "validation", document._replace(text=text[at:])

    def _capped(self, sources: Sequence[Source]) -> Iterator[Document]:
        left = self._data.max_bytes
        for document in self._documents(sources):
            if not self._data.max_bytes:
                yield document
                continue
            content = document.text.encode()
            text = content[:left].decode(errors="ignore")
            if text:
                marks = tuple(mark for mark in document.marks if mark[0] <= len(text))
                yield document._replace(text=text, marks=marks)
            left -= len(content)
            if left <= 0:
                return

    def _documents(self, sources: Sequence[Source]) -> Iterator[Document]:
        for source in sources:
            if self._data.unit == "repository":
                yield from _repositories(source, self._data.repository.without_name)
            else:
                yield from source.documents()


def _repositories(source: Source, without_name: float) -> Iterator[Document]:
    """A document for each folder in a source, or for the whole source where it is a git working tree."""
    own = Path(source.where).name or source.where
    whole = (Path(source.where).expanduser() / ".git").exists() or not any("/" in file.name for file in source.files)

    def folder(document: Document) -> str:
        return own if whole or "/" not in document.name else document.name.split("/")[0]

    for name, group in itertools.groupby(source.documents(), key=folder):
        files = {document.name if whole else document.name.removeprefix(f"{name}/"): document for document in group}
        order = repository.reading_order(repository.dependencies({path: one.text for path, one in files.items()}))
        texts = [(path, files[path].text) for path in order]
        languages = [one.language for one in files.values()]
        named = _uniform(f"name of {name}") >= without_name
        text, marks = repository.joined(name if named else "", texts)
        yield Document(name, text, name, max(sorted(set(languages)), key=languages.count), marks)


def pieces(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of about `size` characters, after a line end where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def separable(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of `size` characters or more whose ids, one after the other, are those of the whole text.

    The patterns by which tokenizers split a text before they merge (GPT-2's, GPT-4's, DeepSeek's) let runs of blanks
    depend on what stands around them: the last blank of a run goes to the word behind it. So the only cut is one that
    no run of blanks touches: behind a line end with something else before it and something else after it. A text
    without such a place, such as one of `\\r\\n` lines, is one part.
    """
    start = 0
    while start < len(text):
        cut = _next_cut(text, start + max(size, 2) - 1)
        yield text[start:cut]
        start = cut


def _next_cut(text: str, start: int) -> int:
    """Behind the first line end at `start` or later that no other blank touches; else the end of the text."""
    end = text.find("\n", start)
    while 0 < end < len(text) - 1:
        if not text[end - 1].isspace() and not text[end + 1].isspace():
            return end + 1
        end = text.find("\n", end + 1)
    return len(text)


def describe_skipped(skipped: dict[str, str]) -> str:
    """`3 skipped, e.g. a.bin is binary, not text`; empty when nothing was."""
    return f"{len(skipped)} skipped{_example(skipped)}" if skipped else ""


def _example(skipped: dict[str, str]) -> str:
    first = [f"{name} {reason}" for name, reason in list(skipped.items())[:3]]
    return f", e.g. {'; '.join(first)}" if first else ""


def _uniform(key: str) -> float:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
