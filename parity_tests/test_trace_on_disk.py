"""Traces of large models: the same values in one file without a name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.parity.trace import Trace, on_disk

TRACE = Trace(
    {
        "forward": {"embed": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(3, 2), "chosen": np.array([True, False])},
        "loss": {"loss": np.array(2.5), "nothing": np.ones((0, 2))},
    },
    [[1, 2]],
    {"weight": np.asfortranarray(np.arange(6.0).reshape(2, 3))},
)


def test_values_are_the_same_and_one_descriptor_is_taken() -> None:
    before = len(os.listdir("/dev/fd"))
    filed = on_disk(TRACE)
    assert len(os.listdir("/dev/fd")) - before <= 1
    for found, given in zip(
        (*filed.levels.values(), filed.weights), (*TRACE.levels.values(), TRACE.weights), strict=True
    ):
        assert found.keys() == given.keys()
        for name, array in found.items():
            assert array.dtype == given[name].dtype and (isinstance(array, np.memmap) or not array.size)
            np.testing.assert_array_equal(array, given[name])
    assert filed.tokens == TRACE.tokens


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=rf"{tmp_path}: no room for the \d+ bytes of a trace") as caught:
        on_disk(TRACE)
    assert "TMPDIR" in caught.value.hint
