"""torch_ref mirrors jaxlm: a file at the same path has the same public functions, with the same parameter names.

Read from the source, so neither framework is loaded. Exceptions stand here, each with its reason.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("ops", "models", "objectives", "train", "infer", "recipes")

DIALECT = {
    *("key", "seed", "axis", "device", "layout", "site", "platform", "matmul"),
    *("params", "decoder", "model", "routing", "moves"),
}
"""Parameters that one framework needs for what the other keeps elsewhere: random numbers, the mesh, precision; and
parameters, which are arguments in JAX and lie within a module in PyTorch."""


def functions(path: Path) -> dict[str, list[str]]:
    """Public functions at the top of a file, and the names of their parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }


def shared() -> list[Path]:
    theirs = (
        path.relative_to(ROOT / "torch_ref") for room in ROOMS for path in (ROOT / "torch_ref" / room).rglob("*.py")
    )
    return sorted(path for path in theirs if (ROOT / "jaxlm" / path).exists() and path.name != "__init__.py")


def differences(path: Path, root: Path = ROOT) -> list[str]:
    """What a file of torch_ref and its twin do not have in common, one line each."""
    ours, theirs = functions(root / "jaxlm" / path), functions(root / "torch_ref" / path)
    found = [f"{path}: only torch_ref has {name}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(theirs.keys() & ours.keys()):
        apart = (set(ours[name]) ^ set(theirs[name])) - DIALECT
        if apart:
            found.append(f"{path}: {name} differs in {', '.join(sorted(apart))}")
    return found


@pytest.mark.parametrize("path", shared(), ids=str)
def test_names_are_the_same(path: Path) -> None:
    assert [line for line in differences(path) if line not in EXCEPTIONS] == []


EXCEPTIONS = {
    "infer/generate.py: only torch_ref has blocks": "in jaxlm the engine streams text",
    "infer/generate.py: only torch_ref has decoder_of": "jaxlm opens models in convert.open_model",
    "infer/generate.py: only torch_ref has open_folder": "jaxlm opens models in convert.open_model",
    "infer/generate.py: only torch_ref has main": "the command line of a machine without JAX",
    "models/layers.py: only torch_ref has normal_": "Flax has initialisers of its own",
    "models/layers.py: only torch_ref has linear_maps": "in jaxlm maps are a tree, not modules: train.program",
    "ops/attention/attend.py: only torch_ref has default_impl": "jaxlm chooses kernels in ops.attention.kernels",
    "ops/attention/attend.py: only torch_ref has merge": "in jaxlm it stands in ops.attention.visible",
    "ops/attention/attend.py: only torch_ref has visible": "in jaxlm it stands in ops.attention.visible",
    "ops/attention/attend.py: attend_first differs in earlier": "tokens of earlier devices: torch_ref has one",
    "train/engine.py: only torch_ref has matmul_params": "jaxlm counts in counts.parameters",
    "train/engine.py: only torch_ref has saved_params": "in jaxlm it stands in train.adapters",
    "train/engine.py: only torch_ref has pick_device": "JAX finds its devices by itself",
    "train/optim.py: only torch_ref has adamw": "Optax has its own",
    "train/optim.py: only torch_ref has set_learning_rate": "Optax has the schedule inside",
    "train/optim.py: only torch_ref has updates_made": "Optax counts inside",
}


def test_every_exception_is_needed() -> None:
    lines = {line for path in shared() for line in differences(path)}
    assert EXCEPTIONS.keys() - lines == set()


def test_a_missing_twin_and_another_parameter_are_seen(tmp_path: Path) -> None:
    for room, source in (("jaxlm", "def f(x, scale): ..."), ("torch_ref", "def f(x, size): ...\ndef g(): ...")):
        (tmp_path / room / "ops").mkdir(parents=True)
        (tmp_path / room / "ops" / "norm.py").write_text(source)
    assert differences(Path("ops/norm.py"), tmp_path) == [
        "ops/norm.py: only torch_ref has g",
        "ops/norm.py: f differs in scale, size",
    ]
