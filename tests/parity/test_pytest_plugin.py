"""The pytest plugin, in a pytest of its own: write, check, fail with one clear line, and cost nothing before."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxlm import config
from jaxlm.config import toml

ROOT = Path(__file__).parents[2]
MODEL = config.Model(vocab_size=31, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_seq_len=16, positions="learned")
TEST = """
import sys


def test_light():
    assert not {"jax", "torch", "jaxlm.parity"} & sys.modules.keys()


def test_model(parity_golden):
    parity_golden("model.toml", "golden/model.json.gz", dtypes=("float64",))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with one test of a tiny model."""
    (tmp_path / "test_model.py").write_text(TEST)
    write(tmp_path, MODEL)
    return tmp_path


def write(project: Path, model: config.Model) -> None:
    data = config.Data(cache_dir=str(project / "cache"), seq_len=16)
    (project / "model.toml").write_text(toml.to_toml(config.Config(model=model, data=data)))


def run(project: Path, *options: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:jaxlm", "-p", "jaxlm.pytest_plugin", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=250)
    return done.returncode, done.stdout + done.stderr


def test_missing_written_checked_and_changed(project: Path) -> None:
    code, told = run(project)
    assert code == 1 and "1 failed, 1 passed" in told
    assert "golden/model.json.gz: no golden file; write it with `pytest --parity-write` and commit it" in told
    assert run(project, "--parity-write")[0] == 0
    code, told = run(project)
    assert code == 0 and "2 passed" in told
    write(project, dataclasses.replace(MODEL, norm_eps=1e-4))
    code, told = run(project)
    assert code == 1 and "model.norm_eps" in told and "1e-05 in the golden file, 0.0001 now" in told
    assert "the computation has changed; `pytest --parity-write` if it is meant" in told


def test_the_entry_point_names_the_plugin() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert declared == {"jaxlm": "jaxlm.pytest_plugin"}
