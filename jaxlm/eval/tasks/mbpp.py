"""MBPP: 974 short tasks, each a sentence and three tests (Austin et al. 2021)."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.eval.code.problems import Problem, find_file, rows
from jaxlm.eval.code.programs import parse
from jaxlm.sandbox import Tests

FILES = ("mbpp/mbpp.jsonl", "mbpp/mbpp.jsonl.gz")
SHOTS = (2, 3, 4)
"""The examples of the paper, section 3."""
TEST_IDS = range(11, 511)
TASK = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
)


def shown(row: dict) -> str:
    """The question as the model reads it, up to `[BEGIN]`."""
    return TASK.format(text=row["text"], tests="\n".join(row["test_list"])) + "[BEGIN]\n"


def prompt(row: dict, shots: Sequence[dict]) -> str:
    """The prompt: solved examples, then the question."""
    examples = (f"{shown(shot)}{_code(shot)}\n[DONE]\n" for shot in shots)
    return "".join(examples) + shown(row)


def _code(row: dict) -> str:
    return row["code"].replace("\r\n", "\n")


def tests(row: dict, listed: Sequence[str]) -> Tests:
    """Make tests. The reference's functions and classes that they use are the answer's, its imports are the tests' own.

    Raises: UserError.
    """
    source = "\n".join([row["test_setup_code"].replace("\r\n", "\n"), *listed]) + "\n"
    tree, reference = parse(source), parse(_code(row))
    if tree is None or reference is None:
        raise UserError(f"MBPP {row['task_id']} does not compile", "is this the file of the set?")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    body = reference.body
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name in used]
    classes = [node.name for node in body if isinstance(node, ast.ClassDef) and node.name in used]
    imports = [
        ast.unparse(node)
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and any((name.asname or name.name.split(".")[0]) in used for name in node.names)
    ]
    if not functions:
        raise UserError(f"the tests of MBPP {row['task_id']} call no function of the reference")
    return Tests(source, (*functions, *classes), "\n".join(imports), tuple(classes))


def problems(path: str | Path | None = None, shots: int = 3, every: bool = False) -> list[Problem]:
    """Read the set.

    Args:
        path: its file; by default under `JAXLM_DATA`.
        shots: solved examples in the prompt, 0 to 3.
        every: all 974, not only the test part, ids 11 to 510.

    Raises: UserError.
    """
    file = find_file(path, *FILES)
    kinds = {"task_id": int, "test_list": list, "challenge_test_list": list}
    read = rows(file, "text", "code", "test_setup_code", optional=["challenge_test_list"], **kinds)
    table = {row["task_id"]: row for row in read}
    examples = [table[number] for number in SHOTS[:shots] if number in table]
    made = []
    for number, row in table.items():
        if not every and number not in TEST_IDS:
            continue
        basic = tests(row, row["test_list"])
        made.append(
            Problem(
                task_id=str(number),
                prompt=prompt(row, examples),
                tests=basic,
                entry=basic.names[0],
                reference=_code(row),
                after="\n",
                stops=("[DONE]",),
                question=TASK.format(text=row["text"], tests="\n".join(row["test_list"])),
                challenge=tests(row, row["challenge_test_list"]) if row.get("challenge_test_list") else None,
            )
        )
    return made
