"""Middles that are whole nodes of the syntax, for `data.fim.span = "syntax"` (AST-FIM, Gong et al. 2025).

Python is read by `ast`, block by block and line by line where that fails, so that a piece that is cut at both ends
still has nodes. Other languages are read by tree-sitter; each grammar is a package of its own (extra `syntax`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.data.fim import Spans, by_lines
from jaxlm.errors import UserError

GRAMMARS = {
    "shell": "tree_sitter_bash",
    "c": "tree_sitter_c",
    "java": "tree_sitter_java",
    "javascript": "tree_sitter_javascript",
    "go": "tree_sitter_go",
    "rust": "tree_sitter_rust",
}
"""Packages of the grammars, by language."""
LEAST = 8
"""Characters of a node that may be a middle: less is a name or a number."""

PASSES = 20
"""How many times a text is read at most, in parts: one in which nothing can be read must not cost its square."""

_BLOCK = re.compile(r"[^\s#)\]}'\"]")
"""How a line goes on behind its blanks, where a block begins."""


@functools.cache
def by_nodes(language: str) -> Spans:
    """Chooses a whole node of the text, each with the same chance; whole lines where a text has none to read.

    Raises:
        UserError: the package of the grammar is not installed.
    """
    if language == "python":
        nodes = python_nodes
    elif language in GRAMMARS:
        nodes = functools.partial(tree_nodes, _parser(language))
    else:
        return by_lines

    def spans(text: str, random: np.random.Generator) -> tuple[int, int] | None:
        found = sorted({span for span in nodes(text) if span[1] - span[0] >= LEAST})
        return found[int(random.integers(len(found)))] if found else by_lines(text, random)

    return spans


def python_nodes(text: str) -> Iterator[tuple[int, int]]:
    """Characters of each statement and expression that can be read, however the text is cut at both ends."""
    lines = text.replace("\r", " ").split("\n")  # to `ast` each is the end of a line
    places = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
    todo, room = [(0, len(lines))], PASSES * len(text)
    while todo and room > 0:
        first, last = todo.pop()
        room -= places[last] - places[first]
        depths = [len(line) - len(line.lstrip(" \t")) for line in lines[first:last] if line.strip()]
        depth = min(depths, default=0)
        try:
            tree = ast.parse("\n".join(line[depth:] for line in lines[first:last]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # What cannot be read as a whole is read block by block, and one block without its first line.
            begins = [i for i in range(first + 1, last) if _begins(lines[i], depth)]
            todo += itertools.pairwise([first, *begins, last]) if begins else [(first + 1, last)]
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.stmt | ast.expr) and node.end_lineno is not None:
                begin, end = first + node.lineno - 1, first + node.end_lineno - 1
                yield (
                    places[begin] + depth + _characters(lines[begin][depth:], node.col_offset),
                    places[end] + depth + _characters(lines[end][depth:], node.end_col_offset or 0),
                )


def _begins(line: str, depth: int) -> bool:
    """Whether a block may begin with a line at this depth: not with a bracket that closes, nor inside a string."""
    return not line[:depth].strip() and _BLOCK.match(line, depth) is not None


def _characters(line: str, column: int) -> int:
    """Characters of the first `column` bytes of a line."""
    return column if line.isascii() else len(line.encode()[:column].decode(errors="ignore"))


def tree_nodes(parser: Any, text: str) -> Iterator[tuple[int, int]]:
    """Characters of each named node that holds no error."""
    content = text.encode()
    todo = [parser.parse(content).root_node]
    while todo:
        node = todo.pop()
        todo += node.named_children
        if node.is_named and not node.has_error and node.parent is not None:
            if text.isascii():
                yield node.start_byte, node.end_byte
            else:
                begin = len(content[: node.start_byte].decode(errors="ignore"))
                yield begin, begin + len(content[node.start_byte : node.end_byte].decode(errors="ignore"))


@functools.cache
def _parser(language: str) -> Any:
    for package in ("tree_sitter", GRAMMARS[language]):
        if importlib.util.find_spec(package) is None:
            name = package.replace("_", "-")
            raise UserError(f"data.fim.span = 'syntax' on {language} needs {name}", "pip install 'jaxlm[syntax]'")
    tree_sitter = importlib.import_module("tree_sitter")
    grammar = importlib.import_module(GRAMMARS[language])
    return tree_sitter.Parser(tree_sitter.Language(grammar.language()))
