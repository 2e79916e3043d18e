"""The notebooks of docs/tutorials run from top to bottom, in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.child_flags import with_devices

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """Their own assertions are the test. They train on a corpus of two files, not on the standard library."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("ast", "argparse", "textwrap"):
        (corpus / f"{name}.py").write_text((Path(os.__file__).parent / f"{name}.py").read_text())
    text = path.read_text().replace('"out_dir=runs/tutorial",', f'"out_dir=runs/tutorial", "data.source={corpus}",')
    (tmp_path / path.name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": with_devices()}
    done = subprocess.run(
        [sys.executable, path.name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_there_are_two() -> None:
    assert [path.stem for path in TUTORIALS] == ["my_pytorch_model", "train_look_continue"]
