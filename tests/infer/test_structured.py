"""Grammars: whatever the weights prefer, a finished text is valid; what cannot be followed is refused by name."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from jaxlm.errors import UserError
from jaxlm.infer.engine import Engine, Grammar, Request
from jaxlm.infer.engine.runner import Drawn, Orders
from jaxlm.infer.engine.structured import Grammars
from jaxlm.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON_TEXT = json.dumps(PERSON)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.bytes_level()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, [tokenizer.special("eot")])


def written(grammars: Grammars, tokenizer: Tokenizer, grammar: Grammar, seed: int, most: int = 200) -> tuple[str, bool]:
    """A text of random allowed ids, and whether it has ended."""
    guide, rng, ids = grammars.follow(grammar), np.random.default_rng(seed), []
    mask = np.zeros((2, -(-tokenizer.vocab_size // 32)), np.int32)
    while not guide.over and len(ids) < most:
        assert guide.allow(mask, 1) == ""
        bits = (mask[1][:, None] >> np.arange(32)) & 1
        allowed = np.flatnonzero(bits.ravel()[: tokenizer.vocab_size])
        ends = allowed[allowed == tokenizer.eot]
        ids.append(int(rng.choice(ends if len(ends) and rng.random() < 0.3 else allowed)))
        guide.push(ids[-1])
    return tokenizer.decode(ids, skip_special=True), guide.over


@pytest.mark.parametrize("seed", range(10))
def test_a_finished_text_is_valid(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    import jsonschema

    text, over = written(grammars, tokenizer, Grammar(json_schema=PERSON_TEXT), seed)
    if over:
        jsonschema.validate(json.loads(text), PERSON)
        assert not re.search(r"\s{9}", re.sub(r'"(\\.|[^"\\])*"', "s", text))  # trap 16
    for grammar in (Grammar(regex=r"[a-f]{2,5}-[0-9]+"), Grammar(lark='start: "x" /[0-9]{2}/ "y"?')):
        text, over = written(grammars, tokenizer, grammar, seed)
        pattern = grammar.regex or "x[0-9]{2}y?"
        assert not over or re.fullmatch(pattern, text)
    text, over = written(grammars, tokenizer, Grammar(choices=("yes", "no", 'a "quote"\n')), seed)
    assert over and text in ("yes", "no", 'a "quote"\n')


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json_schema": '{"type": "nonsense"}'}, "nonsense"),
        ({"json_schema": "{oops"}, "grammar cannot be"),
        ({"regex": "(a"}, "grammar cannot be followed"),
        ({"lark": "start: nowhere"}, "nowhere"),
    ],
    ids=str,
)
def test_what_cannot_be_followed(grammars: Grammars, options: dict[str, Any], line: str) -> None:
    """Trap 11."""
    with pytest.raises(UserError, match=line) as caught:
        grammars.follow(Grammar(**options))
    assert "\n" not in str(caught.value)


class NumpyRunner:
    """Draws an allowed id by its random number; has no model."""

    rows, length, widths, programs = 2, 200, (4, 16), {}

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def decode(self, orders: Orders) -> Drawn:
        tokens = np.zeros((1, self.rows), np.int32)
        for row in np.flatnonzero(orders.active):
            bits = ((orders.mask[row][:, None] >> np.arange(32)) & 1).ravel()[: self.vocab]
            allowed = np.flatnonzero(bits) if orders.ruled[row] else np.arange(97, 123)
            tokens[0, row] = allowed[int(orders.uniforms[0, row] * len(allowed))]
        nothing = np.zeros((1, self.rows, 20))
        return Drawn(tokens, tokens < 0, nothing[:, :, 0], nothing, nothing, np.ones(self.rows, np.int32))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def test_grammars_among_neighbours(tokenizer: Tokenizer) -> None:
    """Texts with a grammar end valid, as alone; those beside them do not change; a wrong grammar harms nobody."""
    options: dict[str, Any] = {"max_new_tokens": 40}
    requests = [
        Request("a", grammar=Grammar(regex="[a-f]{2,5}-[0-9]{1,3}"), n=3, **options),
        Request("b", seed=5, **options),
        Request("c", grammar=Grammar(choices=("yes", "no")), seed=2, **options),
    ]
    runner: Any = NumpyRunner(tokenizer.vocab_size)
    with Engine(runner, tokenizer, ends=[tokenizer.special("eot")], threaded=False) as engine:
        replies = [engine.submit(request) for request in requests]
        together = [reply.result() for reply in replies]
        assert [one.choices for one in together] == [engine.submit(request).result().choices for request in requests]
        with pytest.raises(UserError, match="grammar cannot be followed"):
            engine.submit(Request("a", grammar=Grammar(regex="(")))
    assert all(re.fullmatch("[a-f]{2,5}-[0-9]{1,3}", choice.text) for choice in together[0].choices)
    assert together[0].finish == "stop" and together[2].text in ("yes", "no")
    assert together[1].finish == "length" and len(together[1].text) == 40


def test_one_grammar_at_a_time(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="json_schema and regex given"):
        Grammar(json_schema="{}", regex="a")
    with pytest.raises(UserError, match="none given"):
        Grammar()
    with pytest.raises(UserError, match="ends a text"):
        Grammars(tokenizer, tokenizer.vocab_size, [])
