"""A sandbox that holds on this machine, and the backends that can be tried here."""

from __future__ import annotations

import pytest

from jaxlm.errors import UserError
from jaxlm.sandbox import Sandbox, choose
from jaxlm.sandbox.choose import BACKENDS


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return choose()
    except UserError as error:
        pytest.skip(f"nothing isolates code here: {error}")


@pytest.fixture(scope="session", params=["bwrap", "landlock"])
def each_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    if reason := BACKENDS[request.param].problem():
        pytest.skip(reason)
    return choose(request.param)
