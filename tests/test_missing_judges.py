"""Where torch or transformers is missing, parity_tests/ fails: it does not skip what it was written for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys, pytest
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError("No module named {name}", name={name!r})
sys.meta_path.insert(0, Hidden())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-n", "0", "parity_tests/test_windows.py"]))
"""


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_the_parity_suite_fails(name: str) -> None:
    command = [sys.executable, "-c", WITHOUT.format(name=name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode not in (0, 5), done.stdout  # 5: no test was found
    assert f"No module named {name}" in done.stdout + done.stderr
    assert "skipped" not in done.stdout and "passed" not in done.stdout
