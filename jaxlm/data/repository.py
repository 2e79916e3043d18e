"""Repositories: the files of one repository in one document, those that others import first.

    <|repo_name|>NAME<|file_sep|>PATH
    text of the file<|file_sep|>PATH
    text of the next one ...                            (StarCoder 2, Lozhkov et al. 2024, section 5.1)

The order is DeepSeek-Coder's (Guo et al. 2024, algorithm 1): within each connected component, take the file that waits
for the fewest others, again and again, so that circles end; ties go by name. README files come first, tests last.
"""

from __future__ import annotations

import ast
import heapq
import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.text.tokenizer import Tokenizer

_C = re.compile(r'^[ \t]*#[ \t]*(?:include|import)[ \t]*[<"]([^>"\n]+)[>"]', re.M)
_SCRIPT = re.compile(r"""(?:\bfrom\s*|\bimport\s*\(?\s*|\brequire\s*\(\s*)["'](\.{1,2}/[^"'\n]*|\.{1,2})["']""")
_JAVA = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+(?:\.\*)?)[ \t]*;", re.M)
_GO_BLOCK = re.compile(r'^import\s*(?:\(([^)]*)\)|((?:[\w.]+[ \t]+)?"[^"\n]+"))', re.M)
_RUST_MOD = re.compile(r"^[ \t]*(?:pub(?:\([^)]*\))?[ \t]+)?mod[ \t]+(\w+)[ \t]*;", re.M)
_RUST_USE = re.compile(r"\bcrate((?:::\w+)+)")
_SHELL = re.compile(r"""^[ \t]*(?:source|\.)[ \t]+["']?([^\s"';&|]+)""", re.M)
_SCRIPT_ENDINGS = ("", ".ts", ".tsx", ".js", ".jsx", ".mjs", ".cjs", ".d.ts", "/index.ts", "/index.tsx", "/index.js")
_TESTS = re.compile(r"(^|/)(tests?|testing|spec|__tests__)/|(^|/)test_[^/]*$|_test\.\w+$|[._]spec\.\w+$", re.I)

Resolve = Callable[[str, str, "Paths"], Iterable[str]]
"""Path, text, all paths: the paths that the text imports, those that do not exist among them."""


class Marks(NamedTuple):
    """Ids of the marks before the name of the repository, and before the path of each file."""

    name: int
    file: int


def marks_of(tokenizer: Tokenizer) -> Marks:
    """The marks of a tokenizer; one that was made here has them among its reserved tokens.

    Raises:
        UserError: it has none.
    """
    name = tokenizer.id_of("<|repo_name|>", "<repo_name>", "<reponame>", "<|reserved_1|>")
    file = tokenizer.id_of("<|file_sep|>", "<file_sep>", "<|reserved_0|>")
    if name is None or file is None:
        hint = "tokenizer.kind = 'bpe' with tokenizer.specials, or a tokenizer with <|repo_name|> and <|file_sep|>"
        raise UserError("data.unit = 'repository': the tokenizer has no marks for names and files", hint)
    return Marks(name, file)


class Paths:
    """The paths of a repository, found also by how they end."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.all = set(paths)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_folder: dict[str, list[str]] = defaultdict(list)
        for path in sorted(self.all):
            self._by_name[posixpath.basename(path)].append(path)
            self._by_folder[posixpath.dirname(path)].append(path)

    def ending(self, end: str) -> list[str]:
        """Paths that are `end` or end with `/end`; of several, the shortest alone."""
        found = [p for p in self._by_name[posixpath.basename(end)] if p == end or p.endswith("/" + end)]
        return sorted(found, key=lambda path: (len(path), path))[:1]

    def folder_ending(self, end: str) -> list[str]:
        """All paths directly in folders that are `end` or end with `/end`."""
        folders = [f for f in self._by_folder if f == end or f.endswith("/" + end)]
        return [path for folder in sorted(folders, key=lambda f: (len(f), f))[:1] for path in self._by_folder[folder]]


def _python(path: str, text: str, paths: Paths) -> Iterable[str]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    folder = posixpath.dirname(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name.replace(".", "/"), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").replace(".", "/")
            if node.level:
                up = posixpath.normpath(posixpath.join(folder, *[".."] * (node.level - 1), base))
                names = [(posixpath.normpath(posixpath.join(up, alias.name)), up) for alias in node.names]
            else:
                names = [(f"{base}/{alias.name}", base) for alias in node.names]
        else:
            continue
        for name, package in names:
            for module in (name, package):
                if module is None:
                    continue
                exact = [end for end in (f"{module}.py", f"{module}/__init__.py") if end in paths.all]
                near = [] if exact or module.startswith(".") else paths.ending(f"{module}.py")
                near = near or ([] if exact else paths.ending(f"{module}/__init__.py"))
                if exact or near:
                    yield from exact or near
                    break


def _c(path: str, text: str, paths: Paths) -> Iterable[str]:
    for name in _C.findall(text):
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        yield from [beside] if beside in paths.all else paths.ending(posixpath.normpath(name))


def _script(path: str, text: str, paths: Paths) -> Iterable[str]:
    for name in _SCRIPT.findall(text):
        base = posixpath.normpath(posixpath.join(posixpath.dirname(path), name))
        stem = re.sub(r"\.(js|jsx|mjs)$", "", base)  # TypeScript imports `./x.js` and means x.ts
        candidates = [start + ending for start in dict.fromkeys((base, stem)) for ending in _SCRIPT_ENDINGS]
        yield from [one for one in candidates if one in paths.all][:1]


def _java(path: str, text: str, paths: Paths) -> Iterable[str]:
    for name in _JAVA.findall(text):
        end = name.replace(".", "/")
        if end.endswith("/*"):
            yield from paths.folder_ending(end[:-2])
        else:  # a static import names a member behind the class
            yield from paths.ending(f"{end}.java") or paths.ending(f"{posixpath.dirname(end)}.java")


def _go(path: str, text: str, paths: Paths) -> Iterable[str]:
    for block, single in _GO_BLOCK.findall(text):
        for name in re.findall(r'"([^"\n]+)"', block or single):
            parts = name.split("/")
            for start in range(len(parts)):  # the module's own name may stand before the folder
                if found := [p for p in paths.folder_ending("/".join(parts[start:])) if p.endswith(".go")]:
                    yield from found
                    break


def _rust(path: str, text: str, paths: Paths) -> Iterable[str]:
    folder, name = posixpath.split(path)
    inside = folder if name in ("mod.rs", "lib.rs", "main.rs") else posixpath.join(folder, name[:-3])
    for module in _RUST_MOD.findall(text):
        yield from (posixpath.join(inside, f"{module}.rs"), posixpath.join(inside, module, "mod.rs"))
    root = path[: path.rfind("src/") + 4] if "src/" in path else ""
    for use in _RUST_USE.findall(text):
        parts = use.strip(":").split("::")
        for length in range(len(parts), 0, -1):
            base = root + "/".join(parts[:length])
            if found := [one for one in (f"{base}.rs", f"{base}/mod.rs") if one in paths.all]:
                yield from found
                break


def _shell(path: str, text: str, paths: Paths) -> Iterable[str]:
    for name in _SHELL.findall(text):
        plain = re.sub(r"^(\$\{?\w+\}?|\$\([^)]*\))/", "", name)
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), plain))
        yield from [beside] if beside in paths.all else paths.ending(posixpath.normpath(plain).lstrip("./"))


IMPORTS: dict[str, Resolve] = {
    ".py": _python,
    **dict.fromkeys((".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".hh", ".m"), _c),
    **dict.fromkeys((".js", ".jsx", ".ts", ".tsx", ".mjs", ".cjs"), _script),
    ".java": _java,
    ".go": _go,
    ".rs": _rust,
    **dict.fromkeys((".sh", ".bash", ".zsh"), _shell),
}


def dependencies(files: Mapping[str, str]) -> dict[str, set[str]]:
    """For each path, the other paths that its text imports."""
    paths = Paths(files)
    out: dict[str, set[str]] = {}
    for path, text in files.items():
        resolve = IMPORTS.get(posixpath.splitext(path)[1])
        found = set(resolve(path, text, paths)) if resolve else set()
        out[path] = (found & paths.all) - {path}
    return out


def reading_order(needs: Mapping[str, set[str]]) -> list[str]:
    """All paths: README files, then each component with what is imported before what imports it, then tests."""
    waiting = {path: len(needs[path]) for path in needs}
    wanted_by: dict[str, set[str]] = defaultdict(set)
    for path, imported in needs.items():
        for other in imported:
            wanted_by[other].add(path)
    ordered: list[str] = []
    taken: set[str] = set()
    for first in sorted(needs):
        if first in taken:
            continue
        queue = [(waiting[path], path) for path in _component(first, needs, wanted_by)]
        heapq.heapify(queue)
        while queue:
            count, path = heapq.heappop(queue)
            if path in taken or count != waiting[path]:
                continue  # it was put in again with fewer to wait for
            taken.add(path)
            ordered.append(path)
            for other in wanted_by[path] - taken:
                waiting[other] -= 1
                heapq.heappush(queue, (waiting[other], other))
    return sorted(ordered, key=_place)


def _component(first: str, needs: Mapping[str, set[str]], wanted_by: Mapping[str, set[str]]) -> set[str]:
    seen, todo = {first}, [first]
    while todo:
        path = todo.pop()
        new = (needs[path] | wanted_by.get(path, set())) - seen
        seen |= new
        todo += new
    return seen


def _place(path: str) -> int:
    if posixpath.basename(path).lower().startswith("readme"):
        return 0
    return 2 if _TESTS.search(path) else 1


def joined(name: str, files: Sequence[tuple[str, str]]) -> tuple[str, tuple[tuple[int, str], ...]]:
    """The text of a repository without its marks, and where which mark stands; `name` empty: it is left out."""
    text, marks = name, [(0, "repository_name")] if name else []
    parts, length = [text], len(text)
    for path, content in files:
        marks.append((length, "file_separator"))
        parts.append(f"{path}\n{content}")
        length += len(parts[-1])
    return "".join(parts), tuple(marks)


def taken_apart(text: str, marks: Sequence[tuple[int, str]]) -> tuple[str, list[tuple[str, str]]]:
    """Name (empty: left out) and files of what `joined` made; a text that was cut short has fewer of them."""
    ends = [place for place, _ in marks[1:]] + [len(text)]
    name, files = "", []
    for (place, mark), end in zip(marks, ends, strict=True):
        if mark == "repository_name":
            name = text[place:end]
            continue
        path, line_end, content = text[place:end].partition("\n")
        files.append((path + line_end, content))
    return name, files


def encode(
    tokenizer: Tokenizer,
    text: str,
    marks: Sequence[tuple[int, str]],
    begin: Sequence[int],
    end: Sequence[int],
    limit: int,
) -> list[np.ndarray]:
    """Ids of the documents of at most `limit` ids that a repository is cut into, each from `begin` to `end`."""
    ids = marks_of(tokenizer)
    name, files = taken_apart(text, marks)
    head = [*begin, *([ids.name, *tokenizer.encode(name)] if name else [])]
    texts = tokenizer.encode_batch([part for file in files for part in file])
    pairs = [([ids.file, *path], content) for path, content in zip(texts[::2], texts[1::2], strict=True)]
    return rows_of_files(head, pairs, end, limit)


def rows_of_files(
    head: Sequence[int], files: Sequence[tuple[Sequence[int], Sequence[int]]], end: Sequence[int], limit: int
) -> list[np.ndarray]:
    """Documents of at most `limit` ids, cut between files where possible, with name and path repeated.

    Args:
        head: ids of the repository's name; empty when it is left out.
        files: ids of the separator and the path, and ids of the text, of each file in order.
        end: ids that end a document.
    """
    out: list[np.ndarray] = []
    now: list[int] = list(head)
    for path, text in files:
        room = limit - len(end)
        if len(now) > len(head) and len(now) + len(path) + len(text) > room:
            out.append(np.asarray([*now, *end], np.int64))
            now = list(head)
        rest = list(text)
        at_most = max(1, room - len(head) - len(path))
        while len(rest) > at_most:  # a file longer than a row
            out.append(np.asarray([*head, *path, *rest[:at_most], *end], np.int64))
            rest = rest[at_most:]
        now += [*path, *rest]
    if len(now) > len(head):
        out.append(np.asarray([*now, *end], np.int64))
    return out
