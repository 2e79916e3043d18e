"""From a model's text to a program: cut at stop strings, take code out of a chat answer, drop what is not asked for.

The raw program is the text as it is. The sanitised one ends at the last whole statement and has no calls at its top
level; both are scored, side by side, because either alone flatters some model.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

MAX_CUTS = 400
"""Lines that may be dropped from the end until the rest compiles."""

KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
KEPT_VALUES = (ast.Assign, ast.AnnAssign, ast.AugAssign)


class Fence(NamedTuple):
    """A block of code in a text."""

    language: str
    code: str


def cut(text: str, stops: Sequence[str]) -> str:
    """End a text before the earliest of some strings."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def parse(source: str) -> ast.Module | None:
    """Parse a text of others, without the warnings that Python has about it; None where it does not compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def sanitise(program: str) -> str:
    """Keep what a program defines: imports, functions, classes and values, up to the last whole statement.

    A text of which no beginning compiles comes back as it is.
    """
    lines = program.splitlines(keepends=True)
    for end in range(len(lines), max(-1, len(lines) - MAX_CUTS), -1):
        tree = parse("".join(lines[:end]))
        if tree is not None and (tree.body or not program.strip()):
            return _definitions(tree, lines)
    return program


def _definitions(tree: ast.Module, lines: Sequence[str]) -> str:
    kept = []
    for place, node in enumerate(tree.body):
        if not (isinstance(node, (*KEPT, *KEPT_VALUES)) or _is_text(node, place) or _is_guarded_import(node)):
            continue
        decorators = getattr(node, "decorator_list", [])
        begin = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        text = "".join(lines[begin - 1 : node.end_lineno])
        kept.append(text if text.endswith("\n") else f"{text}\n")
    return "".join(kept)


def _is_text(node: ast.stmt, place: int) -> bool:
    return place == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_guarded_import(node: ast.stmt) -> bool:
    """Whether this is a `try` around imports, or an `if` that defines something and is not the main program."""
    if isinstance(node, ast.Try):
        return all(isinstance(inner, (*KEPT, *KEPT_VALUES)) for inner in node.body)
    if isinstance(node, ast.If):
        return "__name__" not in ast.unparse(node.test) and all(
            isinstance(inner, (*KEPT, *KEPT_VALUES)) for inner in node.body
        )
    return False


_OPENING = re.compile(r"^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^\n`]*$")


def fences(text: str) -> Iterator[Fence]:
    """Find the blocks of code in a text, tagged or not, nested by longer fences, unclosed (CommonMark 0.31, 4.5)."""
    mark, language, code = "", "", []
    for line in text.splitlines(keepends=True):
        opening = _OPENING.match(line.rstrip("\r\n"))
        if not mark and opening:
            mark, language, code = opening[1], opening[2].lower(), []
        elif mark and re.fullmatch(rf" {{0,3}}{re.escape(mark[0])}{{{len(mark)},}}[ \t]*", line.rstrip("\r\n")):
            yield Fence(language, "".join(code))
            mark = ""
        elif mark:
            code.append(line)
    if mark:
        yield Fence(language, "".join(code))


def _defines(code: str, entry: str) -> bool:
    return re.search(rf"^\s*(async\s+)?(def|class)\s+{re.escape(entry)}\b", code, re.MULTILINE) is not None


def from_chat(text: str, prompt: str, entry: str) -> str:
    """Make a program of a chat model's answer.

    Code comes from the fences: the blocks from the first that defines the function, else all, else the text itself.
    What the prompt has before the function (imports, other functions) is kept, and a bare body stands behind the
    prompt.

    Args:
        text: the answer.
        prompt: the beginning of the program, up to the signature or its docstring; may be empty.
        entry: the function asked for.
    """
    blocks = [fence.code for fence in fences(text) if fence.language in ("", "python", "py", "python3")]
    defining = [code for code in blocks if _defines(code, entry)]
    code = defining[0] if defining else "\n".join(blocks) if blocks else text
    if defining:
        others = [block for block in blocks if block is not code and not _defines(block, entry)]
        trees = [(block, parse(block)) for block in others]
        helpers = [block for block, tree in trees if tree and any(isinstance(node, KEPT) for node in tree.body)]
        code = "\n".join([*helpers, code])
    if not prompt:
        return code
    if _defines(code, entry):
        place = re.search(rf"^(async\s+)?def\s+{re.escape(entry)}\b", prompt, re.MULTILINE)
        return f"{prompt[: place.start()] if place else ''}{code}"
    first = next((line for line in code.splitlines() if line.strip()), "")
    if first and not first[0].isspace():  # a body without its indentation
        code = "".join(f"    {line}" if line.strip() else line for line in code.splitlines(keepends=True))
    return f"{prompt}{code}"
