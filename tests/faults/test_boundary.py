"""No exception of another library reaches the user: a line, exit code 1; a mistake is a line and exit code 2."""

import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.cli import app
from jaxlm.errors import UserError
from jaxlm.text.completion import StopStrings, encode_prompts
from jaxlm.text.tokenizer import Tokenizer


def outcome(capsys, command) -> tuple[int, str]:
    code = app._guarded(command)
    return code, capsys.readouterr().err


def raising(error: BaseException):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("bad", "mend it"), 2, "error: bad (mend it)"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "error: /x/y: Permission denied"),
        (ValueError("first\nsecond"), 1, "ValueError"),
        (UnicodeError("\udce9"), 1, "UnicodeError"),
        (MemoryError(), 1, "MemoryError"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_every_exception_is_a_line(capsys, monkeypatch, error, code, words):
    monkeypatch.delenv(app.TRACEBACK, raising=False)
    got, told = outcome(capsys, raising(error))
    assert (got, told.count("\n")) == (code, 1)
    assert words in told and "Traceback" not in told and "second" not in told
    assert (code != 1) or app.TRACEBACK in told


def test_the_traceback_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv(app.TRACEBACK, "1")
    code, told = outcome(capsys, raising(ValueError("why")))
    assert code == 1 and "Traceback" in told and told.endswith("shows where)\n")


@settings(max_examples=200, deadline=None)
@given(prompt=st.text(st.characters()) | st.binary().map(os.fsdecode))
def test_any_argument_is_a_prompt_or_refused(prompt):
    tokenizer = Tokenizer.bytes_level()
    try:
        ids = encode_prompts(tokenizer, [prompt])[0]
    except UserError as error:
        assert "not UTF-8" in str(error)
        str(error).encode()
    else:
        assert tokenizer.decode(ids) == (prompt or "<|endoftext|>")


def test_a_stop_string_of_another_encoding_is_refused():
    with pytest.raises(UserError, match="stop string is not UTF-8"):
        StopStrings([os.fsdecode(b"caf\xe9")])


def test_arguments_of_any_bytes_end_in_a_line(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments in (
        [b"info", b"caf\xe9.toml"],
        [b"info", b"quickstart", b"out_dir=\xff"],
        [b"generate", b"\xc3\xa9", b"x"],
    ):
        command = [sys.executable, "-m", "jaxlm", *arguments]
        done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=300)
        assert done.returncode == 2, done.stderr
        assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") <= 8


def test_a_warning_is_printed_once():
    """absl gives the root logger a handler when it logs, and that handler prints every line of every logger."""
    code = """
import logging, sys
from jaxlm.cli.app import speaking
with speaking():
    import absl.logging
    absl.logging.warning("of absl")
    absl.logging.get_absl_logger().critical("of absl")
    logging.getLogger("jaxlm.convert").warning("ours")
    logging.getLogger("another").warning("theirs")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and sorted(done.stderr.splitlines()) == ["of absl", "ours", "theirs"], done.stderr
