"""What is installed works: a wheel, in a folder of its own, used from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.child_flags import with_devices

ROOT = Path(__file__).parents[1]
SOURCES = ("jaxlm", "torch_ref", "configs", "launch", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def pip(*words: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built without a network from a copy of the sources, so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy / name)
    pip("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", copy / "dist", copy)
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


VERBS = """
import contextlib, io, json, sys
folder, *commands = map(json.loads, sys.argv[1:])
import jaxlm, jaxlm.cli
assert jaxlm.__file__.startswith(folder)
printed = []
for command in commands:
    sys.argv = ["jaxlm", *command]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if jaxlm.cli.main():
            sys.exit(1)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def jaxlm(installed: Path, where: Path, *commands: list[str]) -> list[str]:
    """What verbs of the installed package print, called one after the other from `where`, in one process."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "XLA_FLAGS": with_devices()}
    words = [sys.executable, "-c", VERBS, *map(json.dumps, [str(installed), *commands])]
    done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_config_and_script_is_in_the_wheel(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("jaxlm/shipped/")}
    beside = {
        f"jaxlm/shipped/{path.relative_to(ROOT).as_posix()}"
        for folder in ("configs", "launch")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert inside == beside and len(inside) > 50


def test_verbs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    model, machine = ["dense-134m", "mesh=zero3"], ["--topology", "v5e:2x4"]
    every, one, plan, _, _ = jaxlm(
        installed,
        tmp_path,
        ["info", "--json"],
        ["info", *model, "mesh.fsdp=8", "--json"],
        ["plan", "quickstart", "mesh=zero3", *machine, "--no-compile"],
        ["launch", "slurm", *model, "--out", "job.sbatch", "--nodes", "2"],
        ["launch", "jobset", *model, "--out", "job.yaml", "--image", "registry/jaxlm:1", *machine],
    )
    assert len(json.loads(every)) == len(list((ROOT / "configs" / "models").glob("*.toml")))
    split = json.loads(one)
    assert 130e6 < split["total"] < 138e6 and split["devices"] == 8
    assert "v5e" in plan
    assert "dense-134m" in (tmp_path / "job.sbatch").read_text()
    assert "kind: JobSet" in (tmp_path / "job.yaml").read_text()
