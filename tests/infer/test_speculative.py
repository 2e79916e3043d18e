"""Guesses: where the newest tokens stood before, how many are made, and what a grammar leaves of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.infer.engine.draft import DraftRow, check_draft
from jaxlm.infer.engine.growing import Growing
from jaxlm.infer.engine.request import Grammar, Request
from jaxlm.infer.engine.speculative import GRAMS, MOST_GUESSES, Guesser, Lookup, Speculation
from jaxlm.infer.engine.structured import Grammars
from jaxlm.text.tokenizer import Tokenizer


def slow_guess(ids: list[int], count: int) -> list[int]:
    """What followed the longest gram at the end where it stood last before, read again as it repeats."""
    for size in GRAMS:
        for end in range(len(ids) - 1, size - 1, -1):
            if len(ids) > size and ids[end - size : end] == ids[-size:]:
                return [(ids[end:] * count)[i] for i in range(count)]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 40), st.integers(1, 7))
def test_a_guess_is_what_followed(ids: list[int], cut: int, count: int) -> None:
    """However the text came in."""
    lookup = Lookup()
    lookup.push(ids[:cut])
    lookup.push(ids[cut:])
    assert lookup.guess(count) == slow_guess(ids, count)


def growing(prompt: list[int], limit: int = 1000, forced: tuple[int, ...] = ()) -> Growing:
    request = Request(prompt, forced=forced)
    return Growing(request, 0, prompt, limit=limit, full="length", ends=(), tokenizer=None)


def guessed(guesser: Guesser) -> list[int]:
    return guesser.forced() or guesser.look_up(guesser.wanted())


def no_draft(*_: object) -> Any:
    raise AssertionError("there is no draft")


def test_the_number_of_guesses_adapts() -> None:
    """Doubled while all are right, halved to nothing while none is; then longer and longer pauses."""
    text = growing([1, 2, 3, 4] * 5)
    guesser = Guesser(text, MOST_GUESSES)
    counts = []
    for _ in range(3):
        counts.append(len(guessed(guesser)))
        guesser.learn(counts[-1], counts[-1])
    assert counts == [4, 7, 7]
    wrong, asked = [], 0
    for token in range(400):
        text.ids.append(1 + (len(text.prompt_ids) + len(text.ids)) % 4)
        if ids := guessed(guesser):
            guesser.learn(len(ids), 0)
            wrong.append(token)
            asked += len(ids)
    assert asked <= 7 + 3 + 1 + 10 and np.diff(wrong)[-1] > np.diff(wrong)[-2] > 16


def test_guesses_end_with_the_text() -> None:
    """The last token needs none; forced tokens are guessed whole, also where nothing else is."""
    assert guessed(Guesser(growing([1, 2] * 9, limit=3), 7)) == [1, 2]
    assert guessed(Guesser(growing([1, 2] * 9, limit=1), 7)) == []
    forced = growing([5], forced=(9, 8, 7))
    guesser = Guesser(forced, 1)
    assert guessed(guesser) == [9, 8, 7]
    guesser.learn(3, 3)
    forced.ids += [9, 8, 7]
    assert guessed(guesser) == []


def test_few_rows_with_guesses_do_not_stop_the_others() -> None:
    speculation = Speculation(4)
    texts = {row: (row, growing([1, 2] * 5 if row == 0 else [row])) for row in range(3)}
    assert speculation.guess(texts, no_draft) == {}
    assert speculation.guess({row: texts[row] for row in (0, 1)}, no_draft) == {0: [1, 2, 1, 2]}
    assert Speculation(0).guess(texts, no_draft) == {}
    with pytest.raises(UserError, match="speculate = 8"):
        Speculation(8)


def test_a_draft_keeps_what_was_right() -> None:
    """Of the tokens that it tried those that the text has, but never the last, which it is yet to see."""
    for ids, known in (([1, 2, 3, 4, 9], 4), ([1, 2, 3, 8, 9], 3), ([1, 2, 3, 4], 3), ([1, 2, 7, 4, 5], 2)):
        row = DraftRow(0, 2, [3, 4, 5])
        row.settle(ids)
        assert (row.known, [*row.tried]) == (known, []), ids


def test_a_draft_needs_the_same_tokenizer() -> None:
    ours = Tokenizer.bytes_level()
    check_draft(ours, Tokenizer.bytes_level())
    with pytest.raises(UserError, match=r"another tokenizer: it has \d+ ids, that of the model \d+"):
        check_draft(ours, Tokenizer.bytes_level(specials=False))


def test_a_grammar_looks_ahead() -> None:
    """It cuts off what may not come, forces what must, shows each mask, and stands where it stood."""
    pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")
    tokenizer = Tokenizer.bytes_level()
    end = tokenizer.special("eot")
    guide = Grammars(tokenizer, tokenizer.vocab_size, [end]).follow(Grammar(regex="abc[0-9]+x"))
    masks = np.zeros((8, 2, -(-tokenizer.vocab_size // 32)), np.int32)

    def allowed(step: int) -> set[str]:
        bits = (masks[step, 1][:, None] >> np.arange(32)) & 1
        return {chr(token) for token in np.flatnonzero(bits.ravel()[: tokenizer.vocab_size])}

    assert guide.ahead([*b"abc5y"], masks, 1) == [*b"abc5"]
    assert [allowed(step) for step in (1, 2, 3)] == [{"b"}, {"c"}, set("0123456789")]
    assert allowed(4) == {*"0123456789x"} and not masks[:, 0].any()
    assert guide.ahead([*b"q"], masks, 1) == [] and guide.forced() == [*b"abc"]
    for token in b"abc1":
        guide.push(token)
    assert guide.ahead([*b"2x"], masks, 1) == [*b"2x"] and guide.forced() == [] and not guide.over
    guide.push(ord("x"))
    assert guide.over or allowed(0) == set()
