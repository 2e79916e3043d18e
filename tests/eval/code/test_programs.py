"""From text to program."""

from __future__ import annotations

import pytest

from jaxlm.eval.code.programs import cut, fences, from_chat, sanitise

PROMPT = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r):\n    """Area."""\n'
WHOLE = "def area(r):\n    return math.pi * r * r\n"
BODY = "    return math.pi * r * r\n"


def test_cut_takes_the_earliest_stop_and_strips_nothing() -> None:
    assert cut("  a\n\nclass B\ndef c", ["\ndef", "\nclass"]) == "  a\n"
    assert cut(" x \n", ["\nclass"]) == " x \n" and cut("", ["a"]) == "" and cut("abc", []) == "abc"


@pytest.mark.parametrize(
    ("program", "kept"),
    [
        (WHOLE + "print(area(2))\n", WHOLE),
        (WHOLE + "if __name__ == '__main__':\n    area(1)\n", WHOLE),
        (WHOLE + "def half(x):\n    return (x", WHOLE),
        (
            "import os\nX: int = 3\n@wraps\ndef f():\n    pass\nf()\nassert f() == 1\n",
            "import os\nX: int = 3\n@wraps\ndef f():\n    pass\n",
        ),
        (
            "try:\n    import a\nexcept ImportError:\n    a = None\ninput()\n",
            "try:\n    import a\nexcept ImportError:\n    a = None\n",
        ),
        ("if True:\n    X = 1\nwhile True:\n    pass\n", "if True:\n    X = 1\n"),
        ("class A:\n    x = 1", "class A:\n    x = 1\n"),
        ("this is no code at all", "this is no code at all"),
        ("x = '\0'\n", "x = '\0'\n"),
        ("", ""),
        ("(" * 5000, "(" * 5000),
    ],
)
def test_sanitise(program: str, kept: str) -> None:
    assert sanitise(program) == kept


def test_fences() -> None:
    text = "a\n```python\nx = 1\n```\nb\n````md\n```\ny\n```\n````\n~~~\nz\n~~~\n```py\nunclosed\n"
    assert [(fence.language, fence.code) for fence in fences(text)] == [
        ("python", "x = 1\n"),
        ("md", "```\ny\n```\n"),
        ("", "z\n"),
        ("py", "unclosed\n"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        WHOLE,
        f"Here you are:\n```python\n{WHOLE}```\nDone.",
        f"```\n{WHOLE}```",
        f"```python\n{WHOLE}",
        f"```python\n{BODY}```",
        "```python\nreturn math.pi * r * r\n```",
        f"First `x`.\n```sh\npip install x\n```\n```python\n{WHOLE}```\nUsage:\n```python\nprint(area(1))\n```",
        f"````python\n{WHOLE}````",
        BODY,
    ],
)
def test_from_chat(text: str) -> None:
    namespace: dict = {}
    program = from_chat(text, PROMPT, "area")
    exec(compile(program, "program", "exec"), namespace)
    assert round(namespace["area"](1), 3) == 3.142 and namespace["helper"](2) == 2


def test_helpers_in_a_block_of_their_own_are_kept() -> None:
    text = "```python\ndef twice(x):\n    return 2 * x\n```\nand\n```python\ndef area(r):\n    return twice(r)\n```"
    namespace: dict = {}
    exec(compile(from_chat(text, "", "area"), "program", "exec"), namespace)
    assert namespace["area"](4) == 8
