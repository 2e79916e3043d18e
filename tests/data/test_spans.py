"""Middles that are whole nodes of the syntax."""

import importlib.util

import numpy as np
import pytest

from jaxlm.data.fim import by_lines
from jaxlm.data.rows.spans import GRAMMARS, LEAST, by_nodes, python_nodes
from jaxlm.errors import UserError

WHOLE = "import os\n\n\ndef größe(x, y):\n    return os.path.join(x, 'é' + y)\n\n\nclass A:\n    value = [1, 2, 3]\n"


def test_python_nodes_are_statements_and_expressions():
    found = {WHOLE[begin:end] for begin, end in python_nodes(WHOLE)}
    assert {"import os", "return os.path.join(x, 'é' + y)", "'é' + y", "value = [1, 2, 3]"} <= found
    assert "def größe(x, y):\n    return os.path.join(x, 'é' + y)" in found


def test_a_piece_that_is_cut_at_both_ends_still_has_nodes():
    piece = WHOLE[len("import o") :][:-6]
    found = {piece[begin:end] for begin, end in python_nodes(piece)}
    assert "return os.path.join(x, 'é' + y)" in found and not any("value" in text for text in found)


@pytest.mark.parametrize("text", ["", "   ", "(((", "not python at all: {\n", "\x00"])
def test_what_cannot_be_read_has_none(text):
    assert by_nodes("python")(text, np.random.default_rng(0)) is None


def test_a_span_is_a_node():
    spans = by_nodes("python")
    for seed in range(30):
        span = spans(WHOLE, np.random.default_rng(seed))
        assert span is not None and span[1] - span[0] >= LEAST
        assert span in set(python_nodes(WHOLE))


def test_languages_without_a_grammar_go_by_lines_and_missing_packages_are_named():
    assert by_nodes("tcl") is by_lines
    missing = [language for language, package in GRAMMARS.items() if importlib.util.find_spec(package) is None]
    for language in missing:
        with pytest.raises(UserError, match=rf"on {language} needs tree-sitter.*jaxlm\[syntax\]"):
            by_nodes(language)
