"""The language of a file by its name and, where that says nothing, by its first line."""

from __future__ import annotations

import posixpath
import re

_BY_ENDING = {
    "python": ".py .pyi .pyx",
    "shell": ".sh .bash .zsh .ksh .bats",
    "c": ".c .h",
    "cpp": ".cc .cpp .cxx .hh .hpp .hxx .cu .cuh",
    "java": ".java",
    "javascript": ".js .jsx .mjs .cjs",
    "typescript": ".ts .tsx",
    "go": ".go",
    "rust": ".rs",
    "perl": ".pl .pm",
    "ruby": ".rb",
    "lua": ".lua",
    "awk": ".awk",
    "sql": ".sql",
    "html": ".html .htm",
    "css": ".css",
    "json": ".json",
    "toml": ".toml",
    "yaml": ".yaml .yml",
    "markdown": ".md",
    "restructuredtext": ".rst",
    "tcl": ".tcl",
    "text": ".txt",
}
_ENDINGS = {ending: language for language, endings in _BY_ENDING.items() for ending in endings.split()}
_INTERPRETERS = {
    **dict.fromkeys(("sh", "bash", "dash", "zsh", "ksh", "ash"), "shell"),
    **dict.fromkeys(("python", "pypy"), "python"),
    **dict.fromkeys(("node", "nodejs"), "javascript"),
    **dict.fromkeys(("awk", "gawk", "mawk"), "awk"),
    **{name: name for name in ("perl", "ruby", "lua")},
    **dict.fromkeys(("tclsh", "wish"), "tcl"),
}
LANGUAGES = tuple(sorted({*_BY_ENDING, *_INTERPRETERS.values()}))
"""All names that `language` may return, but the empty one."""


def language(name: str, first_line: str = "") -> str:
    """The language of a file, in small letters; empty when neither name nor first line tell it.

    A name that tells nothing, `configure`, is looked up by the interpreter of its first line, `#!/usr/bin/env -S bash`.
    """
    ending = posixpath.splitext(name)[1].lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if not first_line.startswith("#!"):
        return ""
    words = [word for word in first_line[2:].split() if not word.startswith("-") and "=" not in word]
    programs = [posixpath.basename(word) for word in words]
    if programs[:1] == ["env"]:
        programs = programs[1:]
    return _INTERPRETERS.get(re.sub(r"[\d.]+$", "", programs[0]), "") if programs else ""
