"""Bugs planted into programs that are right: eight operators on the syntax tree, each a small slip of a programmer.

The kinds are those of HumanEvalPack (Muennighoff et al. 2023, table 8: missing logic, excess logic, value, operator,
variable and function misuse), planted by rule. Both the right program and the faulty one are printed by `ast.unparse`,
so that their form does not tell them apart: no operator leaves what a programmer would not write.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from jaxlm.eval.code import kept
from jaxlm.eval.code.problems import Problem
from jaxlm.eval.code.programs import parse
from jaxlm.eval.code.score import without_faults
from jaxlm.sandbox import Limits, Sandbox, grade_many

Change = Callable[[], None]
"""Plants the bug into the tree."""

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.FloorDiv, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
_PAIRS = [
    ("min", "max"), ("any", "all"), ("lower", "upper"), ("sum", "len"), ("append", "extend"), ("sorted", "list"),
    ("startswith", "endswith"), ("abs", "int"), ("ceil", "floor"), ("isupper", "islower"), ("split", "splitlines"),
]  # fmt: skip
FUNCTIONS = dict(_PAIRS) | {second: first for first, second in _PAIRS} | {"set": "list", "round": "int"}
KEPT = "bugs.jsonl"
TRIES = 24
"""Planted bugs of a problem that are tried, until the tests fail on one."""


class Bug(NamedTuple):
    """A faulty program, and the operator that made it."""

    operator: str
    program: str


def _comparison(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """Another bound: `<` for `<=`, `==` for `!=`."""
    for node in _nodes(function):
        if isinstance(node, ast.Compare) and (other := COMPARISONS.get(type(node.ops[0]))):
            yield lambda node=node, other=other: node.ops.__setitem__(0, other())


def _arithmetic(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """Another operation: `+` for `-`, `//` for `%`."""
    for node in _nodes(function):
        if isinstance(node, ast.BinOp | ast.AugAssign) and (other := ARITHMETIC.get(type(node.op))):
            yield lambda node=node, other=other: setattr(node, "op", other())


def _boolean(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """`and` for `or`."""
    for node in _nodes(function):
        if isinstance(node, ast.BoolOp):
            other = ast.Or if isinstance(node.op, ast.And) else ast.And
            yield lambda node=node, other=other: setattr(node, "op", other())


def _condition(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """A condition that is turned round: a comparison by its opposite, `x` for `not x`. Others stay: `not` betrays."""
    for node in _nodes(function):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            test = node.test
            if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
                yield lambda node=node, other=test.operand: setattr(node, "test", other)
            elif isinstance(test, ast.Compare) and len(test.ops) == 1:
                other = OPPOSITES[type(test.ops[0])]
                yield lambda test=test, other=other: test.ops.__setitem__(0, other())


def _constant(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """A number that is off by one."""
    for node in _nodes(function):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            yield lambda node=node, value=node.value + 1: setattr(node, "value", value)


def _variable(function: ast.FunctionDef, names: list[str]) -> Iterator[Change]:
    """Another variable of the function."""
    for node in _nodes(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names and len(names) > 1:
            other = names[(names.index(node.id) + 1) % len(names)]
            yield lambda node=node, other=other: setattr(node, "id", other)


def _function(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """Another function: `min` for `max`, `any` for `all`."""
    for node in _nodes(function):
        if isinstance(node, ast.Call):
            name = "id" if isinstance(node.func, ast.Name) else "attr"
            if other := FUNCTIONS.get(getattr(node.func, name, "")):
                yield lambda node=node, name=name, other=other: setattr(node.func, name, other)


def _missing(function: ast.FunctionDef, _: list[str]) -> Iterator[Change]:
    """A statement that is left out of a block which has others: a bare `pass` betrays."""
    blocks = [function.body, *(getattr(node, "body", []) for node in _nodes(function))]
    for block in blocks:
        code = [node for node in block if not _is_text(node)] if isinstance(block, list) else []
        for node in code if len(code) > 1 else []:
            if isinstance(node, ast.AugAssign | ast.Expr | ast.If | ast.Break | ast.Continue):
                yield lambda block=block, node=node: block.remove(node)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


OPERATORS: dict[str, Callable[[ast.FunctionDef, list[str]], Iterator[Change]]] = {
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "boolean": _boolean,
    "condition": _condition,
    "constant": _constant,
    "variable": _variable,
    "function": _function,
    "missing": _missing,
}


def _nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    for statement in function.body:
        yield from ast.walk(statement)


def plain(program: str, entry: str) -> str:
    """Print a program as faulty ones are printed. Raises: ValueError where it does not define the function."""
    tree, _ = _opened(program, entry)
    return f"{ast.unparse(tree)}\n"


def _opened(program: str, entry: str) -> tuple[ast.Module, ast.FunctionDef]:
    tree = parse(program)
    for node in tree.body if tree else []:
        if isinstance(node, ast.FunctionDef) and node.name == entry:
            return tree or ast.Module([], []), node
    raise ValueError(f"the program defines no function {entry}")


def _sites(function: ast.FunctionDef, operator: str) -> list[Change]:
    arguments = function.args
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    stored = (node.id for node in _nodes(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return list(OPERATORS[operator](function, list(dict.fromkeys([*names, *stored]))))


def candidates(program: str, entry: str, seed: str) -> list[Bug]:
    """Plant bugs into a function, one a candidate: each operator once, at a place drawn, then each once more.

    Args:
        program: source text that is right.
        entry: the function to change; its docstring stays.
        seed: draws the order of operators and places.

    Raises: ValueError where the program does not define the function.
    """
    chance = random.Random(seed)
    right = plain(program, entry)
    places: dict[str, list[int]] = {}
    for operator in OPERATORS:
        places[operator] = list(range(len(_sites(_opened(program, entry)[1], operator))))
        chance.shuffle(places[operator])
    order = list(OPERATORS)
    chance.shuffle(order)
    made: list[Bug] = []
    for number in range(max(map(len, places.values()), default=0)):
        for operator in order:
            if number < len(places[operator]):
                tree, function = _opened(program, entry)
                _sites(function, operator)[places[operator][number]]()
                text = f"{ast.unparse(ast.fix_missing_locations(tree))}\n"
                if text != right and text not in {bug.program for bug in made}:
                    made.append(Bug(operator, text))
    return made[:TRIES]


def plant(
    problems: Sequence[Problem],
    sandbox: Sandbox,
    limits: Mapping[str, Limits],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Bug]:
    """Plant a bug into the reference of each problem, and keep the first on which the tests fail within its limits.

    What was kept on this machine is remembered, so a task that is resumed has the same bugs.

    Args:
        limits: of each problem, by its id.

    Returns: the bugs by problem; a problem is missing where every planted bug passes its tests.

    Raises: UserError where the judge itself fails.
    """
    known = kept.read(KEPT)
    listed = {problem.task_id: candidates(problem.reference, problem.entry, problem.task_id) for problem in problems}
    judged = {id_: [f"{limits[id_].cpu_seconds}", *(bug.program for bug in made)] for id_, made in listed.items()}
    keys = {problem.task_id: kept.key(problem, judged[problem.task_id], sandbox) for problem in problems}
    chosen = {
        task_id: int(known[key]) for task_id, key in keys.items() if 0 <= known.get(key, -1) < len(listed[task_id])
    }
    tries = max(map(len, listed.values()), default=0)
    for number in range(tries):
        open_ones = [one for one in problems if one.task_id not in chosen and number < len(listed[one.task_id])]
        work = ((listed[one.task_id][number].program, one.tests, limits[one.task_id]) for one in open_ones)
        for problem, verdict in zip(open_ones, without_faults(grade_many(work, sandbox)), strict=True):
            if not verdict.passed:
                chosen[problem.task_id] = number
                kept.add(KEPT, keys[problem.task_id], float(number))
                if progress:
                    progress(len(chosen), len(problems))
    return {task_id: listed[task_id][number] for task_id, number in chosen.items()}
