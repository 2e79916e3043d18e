"""The rules of the house, read from the source: who may import whom, what a file may be called, how long it may be.

Each rule is a function from a source tree to its violations; a planted fault shows that it can fail.
"""

from __future__ import annotations

import ast
import collections
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A part of jaxlm imports itself and parts of an earlier line.
ORDER = """
errors
sandbox config
text numerics typed_jax mesh processes
data
run
report
ops
models objectives
counts
train
convert
infer
deploy eval
recipes
parity plan
launch
cli pytest_plugin
__main__
"""
RANKS = {name: rank for rank, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
TORCH_SIDE = {"torch", "torch_ref", "transformers"}
JAX_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax"}
NEUTRAL = {"errors", "config", "text", "data", "run", "report"}  # rooms in which neither framework is imported
NEUTRAL_MODULES = {
    "jaxlm.counts.flops",
    *(f"jaxlm.train.{name}" for name in ("backend", "judges", "loop", "recipe")),
}  # and single modules of others
NEUTRAL_MODULES |= {"jaxlm.infer.memory"} | {
    f"jaxlm.infer.engine.{name}"
    for name in (
        *("draft", "engine", "growing", "orders", "prefix", "reply", "request", "runner", "scheduler"),
        *("speculative", "structured"),
    )
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 400
MAX_FILES = 14
MAX_FUNCTION = 60
VAGUE = re.compile(r"\b(?:told|said|kin)\b")  # words that stood for a callback, a message, a mapping, a set of tensors
MAX_VAGUE = 20
EXPLAINED = ("jaxlm/ops", "jaxlm/parity", "jaxlm/plan")  # rooms of arrays and counts
MIN_COMMENTS = 0.04
ONE_PROGRAM = "jaxlm.sandbox.inside"  # its files start as one program, which loads them as it needs them


@dataclass(frozen=True)
class Import:
    """One imported module, where it stands and when it is loaded."""

    file: Path
    line: int
    module: str
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path.relative_to(root) for folder in folders for path in (root / folder).rglob("*.py"))


def imports(root: Path, file: Path) -> Iterator[Import]:
    """Every import of a file, in functions too; what stands under `if TYPE_CHECKING` is never loaded and left out."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = list(file.with_suffix("").parts[: -child.level]) if child.level else []
                module = ".".join(base + ([child.module] if child.module else []))
                # `from jaxlm import ops` imports jaxlm.ops; a name that is no module does no harm in these rules.
                yield from (Import(file, child.lineno, f"{module}.{alias.name}", lazy) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from (found for other in child.orelse for found in walk(ast.Module([other], []), lazy))
            else:
                yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse((root / file).read_text(encoding="utf-8")), lazy=False)


def part(module: str) -> str | None:
    """`ops` for jaxlm.ops.rope; None for jaxlm itself and for everything outside."""
    names = module.split(".")
    return names[1] if names[0] == "jaxlm" and len(names) > 1 and not names[1].startswith("__version") else None


def wrong_direction(root: Path) -> list[str]:
    """jaxlm imports downwards only."""
    found = []
    for file in python_files(root, "jaxlm"):
        mine = part(".".join(file.with_suffix("").parts))
        for item in imports(root, file):
            theirs = part(item.module)
            if theirs is None or theirs == mine:
                continue
            if mine not in RANKS or theirs not in RANKS:
                found.append(
                    f"{item}: give jaxlm.{mine if mine not in RANKS else theirs} a rank in {Path(__file__).name}"
                )
            elif mine == "__init__" or RANKS[theirs] >= RANKS[mine]:
                found.append(f"{item}, which is not below {mine}")
    return found


def torch_in_jaxlm(root: Path) -> list[str]:
    """Torch is at home in jaxlm.parity; cli, recipes and infer reach torch_ref when a user asks for it; nobody else."""
    found = []
    for file in python_files(root, "jaxlm"):
        mine = part(".".join(file.with_suffix("").parts))
        for item in imports(root, file):
            allowed = mine == "parity" or (
                item.top == "torch_ref" and item.lazy and mine in {"cli", "recipes", "infer"}
            )
            if item.top in TORCH_SIDE and not allowed:
                found.append(f"{item} {'in a function' if item.lazy else 'at import'}")
    return found


def jax_in_torch_ref(root: Path) -> list[str]:
    """torch_ref imports no JAX, and of jaxlm only what imports none either."""
    found = []
    for file in python_files(root, "torch_ref"):
        for item in imports(root, file):
            shared = part(item.module) in NEUTRAL | {None} or item.module.rpartition(".")[0] in NEUTRAL_MODULES
            if item.top in JAX_SIDE or (item.top == "jaxlm" and not shared):
                found.append(str(item))
    for file in python_files(root, "jaxlm"):
        module = ".".join(file.with_suffix("").parts)
        if part(module) in NEUTRAL or module in NEUTRAL_MODULES:
            found += [str(item) for item in imports(root, file) if item.top in JAX_SIDE | TORCH_SIDE]
    return found


def bad_names(root: Path) -> list[str]:
    """A name says what is inside."""
    files = python_files(root, "jaxlm", "torch_ref", "tests", "parity_tests", "benchmarks")
    return [str(file) for file in files if FORBIDDEN_NAMES & {*file.with_suffix("").parts}]


def long_files(root: Path) -> list[str]:
    """A file can be read in one sitting."""
    files = python_files(root, "jaxlm", "torch_ref", "tests", "parity_tests", "benchmarks")
    lengths = {file: (root / file).read_text(encoding="utf-8").count("\n") for file in files}
    return [f"{file}: {lines} lines" for file, lines in lengths.items() if lines > MAX_LINES]


def long_functions(root: Path) -> list[str]:
    """A function fits on a screen, with its docstring."""
    found = []
    for file in python_files(root, "jaxlm", "torch_ref"):
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                found += [f"{file}: {node.name}, {lines} lines"] if lines > MAX_FUNCTION else []
    return found


def full_folders(root: Path) -> list[str]:
    """A folder shows its files at a glance."""
    files = [file for file in python_files(root, "jaxlm", "torch_ref") if file.name != "__init__.py"]
    counts = collections.Counter(file.parent for file in files)
    return [f"{folder}: {count} files" for folder, count in counts.items() if count > MAX_FILES]


def private_imports(root: Path) -> list[str]:
    """A name that begins with an underscore belongs to its file."""
    return [
        str(item)
        for file in python_files(root, "jaxlm", "torch_ref")
        for item in imports(root, file)
        if item.top in ("jaxlm", "torch_ref") and re.match(r"_[a-z]", item.module.rpartition(".")[2])
    ]


def circles(root: Path) -> list[str]:
    """No file imports, through others, a file that imports it."""
    files = {".".join(file.with_suffix("").parts): file for file in python_files(root, "jaxlm", "torch_ref")}
    graph = {
        module: {
            target
            for item in imports(root, file)
            for target in (item.module, item.module.rpartition(".")[0])
            if target in files and target != module
        }
        for module, file in files.items()
    }

    def reachable(start: str) -> set[str]:
        seen, front = set(), [start]
        while front:
            for target in graph[front.pop()] - seen:
                seen.add(target)
                front.append(target)
        return seen

    apart = {module: file for module, file in files.items() if not module.startswith(ONE_PROGRAM)}
    return [f"{file}: imports itself through others" for module, file in apart.items() if module in reachable(module)]


def vague_words(root: Path) -> list[str]:
    """A name and a sentence say what is meant."""
    files = python_files(root, "jaxlm", "torch_ref")
    lines = [
        f"{file}: {line.strip()}"
        for file in files
        for line in (root / file).read_text(encoding="utf-8").splitlines()
        if VAGUE.search(line)
    ]
    return lines if len(lines) > MAX_VAGUE else []


def unexplained_rooms(root: Path) -> list[str]:
    """Of the lines of a room at least one in 25 says why."""
    found = []
    for room in EXPLAINED:
        texts = [(root / file).read_text(encoding="utf-8") for file in python_files(root, room)]
        lines, comments = sum(text.count("\n") for text in texts), sum(map(comment_lines, texts))
        if comments < MIN_COMMENTS * lines:
            found.append(f"{room}: {comments} of {lines} lines have a comment")
    return found


def comment_lines(text: str) -> int:
    """Lines with a comment; one that is for a tool alone does not count."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = (token for token in tokens if token.type == tokenize.COMMENT)
    return len({one.start[0] for one in comments if not re.match(r"#\s*(noqa|pyright:|type:)", one.string)})


RULES = [
    wrong_direction,
    torch_in_jaxlm,
    jax_in_torch_ref,
    bad_names,
    long_files,
    long_functions,
    full_folders,
    private_imports,
    circles,
    vague_words,
    unexplained_rooms,
]
FAULTS: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (wrong_direction, "jaxlm/ops/norm.py", "from jaxlm.models import layers"),
    (wrong_direction, "jaxlm/models/block.py", "from jaxlm import train"),
    (wrong_direction, "jaxlm/models/block.py", "from ..train import step"),
    (wrong_direction, "jaxlm/objectives/lm.py", "def f():\n    import jaxlm.models.decoder"),
    (wrong_direction, "jaxlm/train/loop.py", "from jaxlm.infer.generate import generate"),
    (wrong_direction, "jaxlm/mesh.py", "from jaxlm import ops"),
    (wrong_direction, "jaxlm/config/run.py", "from jaxlm.text import tokenizer"),
    (wrong_direction, "jaxlm/run/directory.py", "from jaxlm.report import plots"),
    (wrong_direction, "jaxlm/errors.py", "from jaxlm import config"),
    (wrong_direction, "jaxlm/__init__.py", "from jaxlm.config import Config"),
    (wrong_direction, "jaxlm/extra/thing.py", "from jaxlm.errors import UserError"),
    (torch_in_jaxlm, "jaxlm/ops/norm.py", "import torch.nn.functional as F"),
    (torch_in_jaxlm, "jaxlm/convert/native.py", "def f():\n    import torch"),
    (torch_in_jaxlm, "jaxlm/cli/app.py", "from torch_ref.infer.generate import generate"),
    (torch_in_jaxlm, "jaxlm/cli/app.py", "def f():\n    import torch"),
    (jax_in_torch_ref, "torch_ref/ops/norm.py", "def f():\n    import jax.numpy as jnp"),
    (jax_in_torch_ref, "torch_ref/train/engine.py", "import optax"),
    (jax_in_torch_ref, "torch_ref/train/engine.py", "from jaxlm.train import optim"),
    (jax_in_torch_ref, "jaxlm/data/pipeline.py", "import jax"),
    (jax_in_torch_ref, "jaxlm/run/schedule.py", "import jax.numpy as jnp"),
    (jax_in_torch_ref, "jaxlm/report/plots.py", "import jax"),
    (private_imports, "jaxlm/train/loop.py", "from jaxlm.train.step import _finite"),
    (bad_names, "jaxlm/train/utils.py", ""),
    (bad_names, "jaxlm/common/norm.py", ""),
    (long_files, "torch_ref/train/engine.py", "x = 0\n" * (MAX_LINES + 1)),
    (long_functions, "jaxlm/train/step.py", "def f():\n" + "    x = 0\n" * MAX_FUNCTION),
]
ALLOWED: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (
        wrong_direction,
        "jaxlm/train/loop.py",
        "from jaxlm import ops\nfrom jaxlm.train import step",
    ),
    (wrong_direction, "jaxlm/cli/app.py", "from jaxlm import __version__\nfrom jaxlm.recipes import pretrain"),
    (torch_in_jaxlm, "jaxlm/parity/trace.py", "import torch"),
    (torch_in_jaxlm, "jaxlm/recipes/pretrain.py", "def f():\n    from torch_ref import train"),
    (torch_in_jaxlm, "jaxlm/ops/norm.py", "if TYPE_CHECKING:\n    import torch"),
    (jax_in_torch_ref, "torch_ref/train/engine.py", "from jaxlm.config import Config\nimport torch"),
    (jax_in_torch_ref, "torch_ref/train/engine.py", "from jaxlm.run.schedule import learning_rate"),
    (long_files, "torch_ref/train/engine.py", "x = 0\n" * MAX_LINES),
    (long_functions, "jaxlm/train/step.py", "def f():\n" + "    x = 0\n" * (MAX_FUNCTION - 1)),
]


def plant(root: Path, file: str, source: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize(("rule", "file", "source"), FAULTS)
def test_rule_finds_a_planted_fault(rule: Callable[[Path], list[str]], file: str, source: str, tmp_path: Path) -> None:
    plant(tmp_path, file, source)
    (violation,) = rule(tmp_path)
    assert violation.startswith(file)


def test_rules_of_several_files_find_planted_faults(tmp_path: Path) -> None:
    for number in range(MAX_FILES):
        plant(tmp_path, f"jaxlm/ops/op{number}.py", "")
    assert full_folders(tmp_path) == circles(tmp_path) == []
    plant(tmp_path, "jaxlm/ops/norm.py", "def f():\n    from jaxlm.ops.rope import angle")
    plant(tmp_path, "jaxlm/ops/rope.py", "from jaxlm.ops import norm")
    assert full_folders(tmp_path) == [f"jaxlm/ops: {MAX_FILES + 2} files"]
    assert circles(tmp_path) == [f"jaxlm/ops/{name}.py: imports itself through others" for name in ("norm", "rope")]


def test_rules_of_counts_find_planted_faults(tmp_path: Path) -> None:
    plant(tmp_path, "torch_ref/train/loop.py", "told = said = 0\n" * MAX_VAGUE)
    plant(tmp_path, "jaxlm/ops/norm.py", "# why\n" + "x = '# no comment'\n" * 24)
    assert vague_words(tmp_path) == unexplained_rooms(tmp_path) == []
    plant(tmp_path, "jaxlm/train/loop.py", '"""Calls what it is told."""\n')
    plant(tmp_path, "jaxlm/ops/rope.py", "x = 0  # noqa: E731\n")
    assert len(vague_words(tmp_path)) == MAX_VAGUE + 1
    assert unexplained_rooms(tmp_path) == ["jaxlm/ops: 1 of 26 lines have a comment"]


@pytest.mark.parametrize(("rule", "file", "source"), ALLOWED)
def test_rule_allows(rule: Callable[[Path], list[str]], file: str, source: str, tmp_path: Path) -> None:
    plant(tmp_path, file, source)
    assert rule(tmp_path) == []


def test_light_modules_load_no_framework() -> None:
    """`jaxlm --help` and every message about a config come at once, and both backends share config and data."""
    data = [
        ".".join(file.with_suffix("").parts) for file in python_files(ROOT, "jaxlm/data") if file.stem != "__init__"
    ]
    code = f"""
import sys, {", ".join(["jaxlm", "jaxlm.config", "jaxlm.cli", *data])}
print(*sorted({JAX_SIDE | TORCH_SIDE!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
