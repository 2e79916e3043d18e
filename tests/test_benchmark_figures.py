"""What two benchmarks count: names of fill-in-the-middle that can be copied, and equations that come to the answer."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from benchmarks.fim import Order, Place, fits, gaps, named_places
from benchmarks.summaries_and_sums import is_answer, last_number, most_frequent_operator, worked_out
from jaxlm.text.tokenizer import Tokenizer

TEXTS = [
    f"def first{n}(value):\n    total = value + {n}\n    other = total * 2\n    return total + other\n\n" * 4
    for n in range(6)
]


def test_a_named_place_can_be_copied_from_below_alone() -> None:
    tokenizer, limit = Tokenizer.train(TEXTS, 320), 96
    places = named_places(tokenizer, TEXTS, limit, 9)
    assert len(places) == 9
    assert not fits(tokenizer, places[0], 12), "a side would be cut"
    assert not fits(tokenizer, Place("    return to", "tal", " + other\n", 0), limit), "`total` is one token"
    for place in places:
        name, text = place.middle.strip(), TEXTS[place.document]
        assert place.before + place.middle + place.after in text
        assert not re.search(rf"\b{name}\b", text[: text.index(place.before + place.middle)] + place.before)
        assert re.search(rf"\b{name}\b", place.after)
    sequences = {order: gaps(tokenizer, places, limit, order) for order in get_args(Order)}
    for order, (ids, counts) in sequences.items():
        for row, count, place in zip(ids, counts, places, strict=True):
            assert len(row) <= limit
            assert [token for token, counted in zip(row, count, strict=True) if counted] == tokenizer.encode(
                place.middle
            )
            shown = tokenizer.decode([token for token in row if token not in tokenizer.specials.values()])
            both = {"above": place.before, "PSM": place.before + place.after}
            assert shown == both.get(order, place.after + place.before) + place.middle


@pytest.mark.parametrize(
    ("equation", "value"),
    [
        ("X=((22.0-14.0)/4.0)", 2.0),
        ("3*6", 18.0),
        ("x=-2+5", 3.0),
        ("X=1/0", None),
        ("X=2**9", None),
        ("X=abs(3)", None),
        ("the answer is 4", None),
    ],
)
def test_a_calculator_works_out_arithmetic_alone(equation: str, value: float | None) -> None:
    assert worked_out(equation) == value


def test_answers_of_word_problems() -> None:
    assert is_answer(worked_out("X=31/3"), "10.333333333333334")
    assert not is_answer(worked_out("X=31/3"), 10.0)
    assert last_number("He has 1,200 apples left, not 7.") == 7.0
    assert last_number("None.") is None
    train = [{"equation": "X=(7.0+8.0)"}, {"equation": "x=1+2-3"}]
    test = [{"question": "3 apples and 4 more", "answer": 7.0}, {"question": "9 less 4", "answer": 5.0}]
    found = most_frequent_operator(train, test)
    assert (found["operator"], found["right"], found["of"]) == ("+", 1, 2)
