"""The pytest plugin of jaxlm: the fixture `parity_golden`, which holds a model to its golden file.

    def test_my_model(parity_golden):
        parity_golden("runs/mine", "golden/mine.json.gz")       # beside the test file

`pytest --parity-write` writes the files; without it a missing file is a failure. It lies outside of `jaxlm.parity`,
for pytest imports it in every project where jaxlm is installed, and that package imports JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

DTYPES = ("float64", "float32", "bfloat16")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--parity-write`."""
    parser.getgroup("jaxlm").addoption(
        "--parity-write", action="store_true", help="Write the golden files of parity_golden instead of checking them."
    )


@pytest.fixture
def parity_golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function of a model and a golden file, whose path is relative to that of the test: it fails when they differ.

    The model is what `jaxlm parity` takes, or a loaded one. `computed_by="torch"` lets torch_ref compute it;
    `dtypes=("float64",)` writes a file that is checked in a third of the time and knows nothing of rounding.
    """

    def hold(model: Any, file: Any, *, computed_by: str = "jaxlm", dtypes: Sequence[str] = DTYPES) -> None:
        from jaxlm.parity import check_golden, write_golden

        path = request.path.parent / file
        if request.config.getoption("--parity-write"):
            write_golden(model, path, computed_by=computed_by, dtypes=dtypes)
        elif not path.is_file():
            pytest.fail(f"{path}: no golden file; write it with `pytest --parity-write` and commit it", pytrace=False)
        else:
            report = check_golden(model, path, computed_by=computed_by)
            if not report.same:
                again = "`pytest --parity-write` if it is meant"
                pytest.fail(f"{report.subject}: {report.verdict}; {again}", pytrace=False)

    return hold
