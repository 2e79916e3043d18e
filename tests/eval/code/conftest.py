"""A sandbox for the tests of code tasks, and the sets where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.sandbox import Sandbox, choose

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return choose()
    except UserError as error:
        pytest.skip(f"nothing isolates code here: {error}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of references are kept in a folder of this run; whether the sandbox holds is already known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setenv("JAXLM_DATA", os.environ.get("JAXLM_DATA", str(SHARED)))  # where the fixture shared_data looks
