"""Texts that must follow a grammar: which tokens may come next, by llguidance (the extra `grammar`).

A JSON schema, a regular expression, a list of choices or a grammar in Lark's language becomes a matcher over the bytes
of the tokenizer's own ids. It says for each step which ids may come, as packed bits, and when the text must end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm.errors import UserError
from jaxlm.infer.engine.request import Grammar
from jaxlm.text.tokenizer import Tokenizer

BLANKS = r"[\x20\x0A\x0D\x09]{0,8}"
"""Between the parts of a JSON text: models are known to write blanks for ever."""


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        vocab: ids of the model.
        ends: ids that end a text.

    Raises:
        UserError: llguidance is not installed, or there is no end id.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Sequence[int]) -> None:
        if not ends:
            raise UserError("a grammar needs an id that ends a text", "the tokenizer has none")
        self._library = _library()
        text = tokenizer.to_json()
        self._tokens = self._library.LLTokenizer(text, n_vocab=vocab, eos_token=list(ends))

    def follow(self, grammar: Grammar) -> Guide:
        """The grammar, before the first token of a text.

        Raises:
            UserError: the grammar is wrong or holds what cannot be followed, which is named.
        """
        matcher = self._library.LLMatcher
        try:
            source = _source(grammar, matcher)
        except ValueError as error:
            raise UserError(f"the grammar cannot be read: {_line(str(error))}") from None
        if problem := matcher.validate_grammar(source, self._tokens):
            raise UserError(f"the grammar cannot be followed: {_line(problem)}")
        return Guide(matcher(self._tokens, source))


class Guide:
    """A text's grammar while the text grows."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allow(self, mask: np.ndarray, row: int) -> str:
        """Set the bits of the ids that may come next in a row of the mask; returns what is wrong, or nothing."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, mask, row)
        return f"the grammar cannot be followed: {_line(self._matcher.get_error())}" if self._matcher.is_error() else ""

    def push(self, token: int) -> None:
        """Take the next token."""
        self._matcher.consume_token(token)

    def forced(self) -> list[int]:
        """The next tokens, as far as there is only one way to go on."""
        return self._matcher.compute_ff_tokens()

    def ahead(self, guesses: Sequence[int], masks_NRW: np.ndarray, row: int) -> list[int]:
        """Look ahead along guessed tokens and come back; returns those that may come.

        Args:
            masks_NRW: gets the bits of the ids that may come after each guess, in this row, from index 1 on.
        """
        matcher = self._matcher
        kept = [*guesses][: matcher.validate_tokens([*guesses])]
        for index, token in enumerate(kept):
            matcher.consume_token(token)
            if self.over or self.allow(masks_NRW[index + 1], row):
                kept = kept[: index + (not matcher.is_error())]
                break
        matcher.rollback(len(kept))
        return kept

    @property
    def over(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())


def _source(grammar: Grammar, matcher: Any) -> str:
    if grammar.json_schema:
        return matcher.grammar_from_json_schema(grammar.json_schema, overrides={"whitespace_pattern": BLANKS})
    if grammar.regex:
        return matcher.grammar_from_regex(grammar.regex)
    if grammar.choices:
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in grammar.choices))
    return matcher.grammar_from_lark(grammar.lark)


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:300]


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("a grammar needs llguidance", 'pip install "jaxlm[grammar]"') from None
    return llguidance
