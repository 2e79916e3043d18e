"""What README and docs name is there: files, Python names, verbs and their options, benchmarks."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from jaxlm.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def missing_files(page: Path, text: str) -> list[str]:
    """Relative links to what is not there, and to headings that their page does not have."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = page if not name else (page.parent / name)
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            found.append(target)
    return found


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_names(code: str) -> list[str]:
    """Names that a piece of Python takes from this project's packages, and that these do not have."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("jaxlm", "torch_ref"):
            module = importlib.import_module(str(node.module))
            found += [f"{node.module}.{one.name}" for one in node.names if not hasattr(module, one.name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxlm":
            found += [] if hasattr(importlib.import_module("jaxlm"), node.attr) else [f"jaxlm.{node.attr}"]
    return found


def commands(text: str) -> Iterator[str]:
    """Lines of a block that begin with `jaxlm`, without what follows a comment or a pipe."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().removeprefix("$ ").startswith("jaxlm "):
            yield re.split(r"\s#|\||&&|>|;", line.strip().removeprefix("$ "))[0]


def unknown_words(command: str) -> list[str]:
    """The verb or the options of a command that the command line does not have."""
    words, here = shlex.split(command)[1:], typer.main.get_command(app)
    while (verbs := getattr(here, "commands", None)) and words and not words[0].startswith("-"):
        verb, words = words[0], words[1:]
        if verb not in verbs:
            return [] if not verb.islower() else [verb]  # VERB stands for any
        here = verbs[verb]
    known = {name for one in here.params for name in (*one.opts, *one.secondary_opts)} | {"--help", "--"}
    own = words[: words.index("--")] if "--" in words else words
    return [word for word in (one.partition("=")[0] for one in own) if word.startswith("--") and word not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_files(page, text) == []
    assert [name for code in blocks(page, "python") for name in missing_names(code)] == []
    told = [line for kind in ("", "sh", "bash", "console") for block in blocks(page, kind) for line in commands(block)]
    assert [(line, words) for line in told if (words := unknown_words(line))] == []
    modules = re.findall(r"python -m (benchmarks\.\w+)", text)
    assert [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()] == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A title, here\n")
    text = "[x](a.md) [y](b.md) [z](a.md#a-title-here) [w](a.md#none) [h](https://x.y/z)"
    assert missing_files(tmp_path / "page.md", text) == ["b.md", "a.md#none"]
    code = "import jaxlm\nfrom jaxlm.text.sampling import Sampling, Sampler\njaxlm.load('x')\njaxlm.lode('x')\n"
    assert missing_names(code) == ["jaxlm.text.sampling.Sampler", "jaxlm.lode"]
    lines = [*commands("$ jaxlm generate RUN --greeedy   # --not-this\njaxlm trian x.toml\nls --jaxlm\n")]
    assert [unknown_words(line) for line in lines] == [["--greeedy"], ["trian"]]
    assert unknown_words("jaxlm launch local --processes 2 -- train CONFIG --resume") == []
