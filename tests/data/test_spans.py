"""Middles that are whole nodes of the syntax."""

import ast
import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.fim import by_lines
from jaxlm.data.rows import spans
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


def test_a_piece_of_a_method_has_nodes_however_deep_it_lies():
    """Rows of 64 tokens cut most pieces inside a method: its first line and its last are halves."""
    piece = "ad(self, path):\n            with open(path) as file:\n                text = file.read()\n"
    piece += "                if not text:\n                    return None\r\n            return self.parse(te"
    found = {piece[begin:end] for begin, end in python_nodes(piece)}
    assert {"text = file.read()", "file.read()", "return None"} <= found
    assert "if not text:\n                    return None" in found
    assert "with open(path) as file:\n" + piece[piece.index("                text") : -2].split("\r")[0] in found
    assert not any(text[-2:] == "te" or "self" in text for text in found)


def test_the_half_method_before_the_next_one_is_read_too():
    head = "            value = compute(one, two)\n            return value\n"
    text = f"{head}\n    def bb(self):\n        return 12345678\n"
    found = {text[begin:end] for begin, end in python_nodes(text)}
    assert {"value = compute(one, two)", "return value", "return 12345678"} <= found


def test_a_text_without_a_node_costs_no_square(monkeypatch):
    read = []
    parse = ast.parse
    monkeypatch.setattr(spans.ast, "parse", lambda text: read.append(len(text)) or parse(text))
    text = '"key": "value",\n' * 400
    assert not list(python_nodes(text)) and sum(read) < 21 * len(text)


@given(st.text(st.sampled_from("ab =:()'\"#\n\r\t\x0cé,if"), max_size=60))
def test_every_node_lies_in_its_text(text):
    for begin, end in python_nodes(text):
        assert 0 <= begin < end <= len(text) and not text[begin:end].isspace()


@pytest.mark.parametrize("text", ["", "   ", "(((", "not python at all: {\n", "\x00", "'no node\nin two lines\n"])
def test_what_cannot_be_read_has_no_node_and_goes_by_lines(text):
    assert not list(python_nodes(text))
    drawn = [by_nodes("python")(text, np.random.default_rng(seed)) for seed in range(9)]
    assert drawn == [by_lines(text, np.random.default_rng(seed)) for seed in range(9)]
    assert any(drawn) == bool(text)


def test_a_span_is_a_node():
    choose = by_nodes("python")
    for seed in range(30):
        span = choose(WHOLE, np.random.default_rng(seed))
        assert span is not None and span[1] - span[0] >= LEAST
        assert span in set(python_nodes(WHOLE))


def test_languages_without_a_grammar_go_by_lines_and_missing_packages_are_named():
    assert by_nodes("tcl") is by_lines
    missing = [language for language, package in GRAMMARS.items() if importlib.util.find_spec(package) is None]
    for language in missing:
        with pytest.raises(UserError, match=rf"on {language} needs tree-sitter.*jaxlm\[syntax\]"):
            by_nodes(language)
