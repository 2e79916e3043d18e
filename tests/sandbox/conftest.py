"""A sandbox that holds on this machine, and the backends that can be tried here."""

from __future__ import annotations

import os

import pytest

from jaxlm.errors import UserError
from jaxlm.sandbox import Sandbox, choose
from jaxlm.sandbox.backends import container
from jaxlm.sandbox.choose import BACKENDS

IMAGE = os.environ.get("JAXLM_CONTAINER_IMAGE", "")
"""An image with Python 3.11, bash and sleep; then the tests of each isolation try its engine too."""


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    try:
        return choose()
    except UserError as error:
        pytest.skip(f"nothing isolates code here: {error}")


@pytest.fixture(scope="session", params=["bwrap", "landlock", *([f"container:{IMAGE}"] if IMAGE else [])])
def each_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    backend = BACKENDS.get(request.param) or container.of(IMAGE)[0]
    if reason := backend.problem():
        pytest.skip(reason)
    return choose(request.param)
