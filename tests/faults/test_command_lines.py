"""Any command line ends in one line on stderr and exit code 2, or does what it says; never in a traceback.

Verbs and options are those that the program has, so a new one is drawn without a line here. Nothing drawn is a model, a
config or a corpus, so no verb begins its work.
"""

import contextlib

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlm.cli import app

BEGIN_AT_ONCE = ("preflight", "sandbox", "local")
"""Verbs that start processes whatever else is said."""

WORDS = ["", " ", "absent", "absent/", "-", "--", "é", "\udce9", "\n", "%s", "*"]
PATHS = ["~", "$UNSET", "gs://x/y"]
NUMBERS = ["-1", "0", "nan", "1e999", "1_0", "9" * 400, "[x", "{}"]
OVERRIDES = ["=", "a=b", "model=", "train.steps", "train.steps=x", "model.n_layers=0"]
VALUES = st.sampled_from([*WORDS, *PATHS, *NUMBERS, *OVERRIDES])


def verbs(command, path=()):
    """Every command with the words that lead to it."""
    if hasattr(command, "commands"):
        return [found for name, inner in command.commands.items() for found in verbs(inner, (*path, name))]
    return [(path, command)]


PROGRAM = typer.main.get_command(app.app)  # made once: it takes longer than a mistake
VERBS = [found for found in verbs(PROGRAM) if not set(found[0]) & set(BEGIN_AT_ONCE)]


@st.composite
def command_lines(draw):
    """A verb, its arguments or too few of them, and some of its options with or without a value."""
    path, command = draw(st.sampled_from(VERBS))
    arguments = draw(st.lists(VALUES, min_size=1, max_size=3))
    options = [name for parameter in command.params for name in parameter.opts if name.startswith("--")]
    options = [name for name in (*options, "--absent") if name != "--list"]  # counts every named model
    for name in draw(st.lists(st.sampled_from(options), max_size=3)):
        arguments += [name, *draw(st.lists(VALUES, max_size=1))]
    return [*path, *arguments]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=command_lines())
def test_a_drawn_command_line_ends_in_a_line(tmp_path_factory, capfd, line):
    with contextlib.chdir(tmp_path_factory.getbasetemp()), pytest.MonkeyPatch.context() as patch:
        patch.delenv("UNSET", raising=False)
        patch.delenv(app.TRACEBACK, raising=False)
        with app.speaking():
            code = app._guarded(lambda: PROGRAM(line, standalone_mode=False))
    told = capfd.readouterr().err
    assert code in ((0, 2) if "--help" in line else (2,)), (line, code, told)
    assert "Traceback" not in told
    assert told.strip()
    assert "--help" in line or told.splitlines()[-1].startswith("error: "), told
