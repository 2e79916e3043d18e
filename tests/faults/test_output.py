"""What is printed: any text on any terminal, and figures that a reader can take in."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.cli import app
from jaxlm.convert.write_model import MEASURABLE, Summary

any_text = st.text(st.characters()) | st.binary().map(os.fsdecode)


@settings(max_examples=200, deadline=None)
@given(
    text=any_text,
    encoding=st.sampled_from(["utf-8", "ascii", "latin-1", "cp1252", "cp437", "koi8-r", "shift_jis", "utf-16"]),
    errors=st.sampled_from(["strict", "surrogateescape"]),
)
def test_any_text_reaches_any_terminal(text: str, encoding: str, errors: str) -> None:
    """On stdout, and as a note on stderr; what the terminal has no sign for is written out, and the rest as it is."""
    notes = logging.getLogger("jaxlm")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, newline="") for _ in range(2)]

    def command(**_: object) -> None:
        print(f"<{text}>")
        notes.warning("<%s>", text)

    with (
        mock.patch.multiple(sys, stdout=streams[0], stderr=streams[1]),
        mock.patch.object(app, "app", command),
        mock.patch.object(notes, "propagate", False),  # a pytest worker cannot send half a surrogate that it has caught
    ):
        assert app.main() == 0
    for stream in streams:
        stream.flush()
        shown = stream.buffer.getvalue()  # type: ignore[attr-defined]
        assert shown == f"<{text}>\n".encode(encoding, "backslashreplace")


@settings(max_examples=150)
@given(st.integers(0, 10**15), st.floats(1e-6, 1e6))
def test_a_conversion_has_a_figure_that_can_be_read(size: int, seconds: float) -> None:
    line = str(Summary(Path("x"), "llama", 3, size, seconds))
    assert "e-" not in line and "e+" not in line
    match = re.fullmatch(r"x: llama, 3 tensors, ([\d,]+\.\d) MB in (\d+\.\d) s(?:, (\d+\.\d\d) GB/s)?", line)
    assert match and (match[3] is None) == (size <= MEASURABLE)
    assert math.isclose(float(match[1].replace(",", "")), size / 1e6, abs_tol=0.051)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--version"], ["info", "configs/quickstart.toml", "--json"]])
def test_a_full_disk_under_standard_output_is_one_line(words: list[str], unbuffered: str) -> None:
    """Python writes out what it holds when it ends, too late for a line and the exit code."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "jaxlm", *words]
    with open("/dev/full", "wb", buffering=0) as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    wanted = "error: standard output: No space left on device"
    assert (ran.returncode, ran.stderr.count("\n"), ran.stderr[: len(wanted)]) == (2, 1, wanted)
