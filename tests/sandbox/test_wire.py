"""Plain data survives the wire in every respect, and nothing else gets on it."""

from __future__ import annotations

import collections
import datetime
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.sandbox.inside import wire
from jaxlm.sandbox.inside.wire import BadMessage, NotPlain, decode, encode

VALUES = [
    None,
    True,
    0,
    -1,
    127,
    128,
    -128,
    -129,
    10**500,
    -0.0,
    math.inf,
    1e-320,
    2j,
    "",
    "a\ud800é\0",
    b"\xff",
    [],
    [1, [2]],
    (1, (2,)),
    {1, "a"},
    frozenset({2}),
    {"b": 1, "a": [2]},
    range(3, 9, 2),
    int,
    dict,
    len,
    collections.Counter("aab"),
    collections.defaultdict(list, {1: [2]}),
    collections.OrderedDict(b=1, a=2),
    collections.deque([1, 2], 5),
    Decimal("1.50"),
    Fraction(-1, 3),
    datetime.date(2020, 1, 2),
    datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
    datetime.time(3, 4),
    datetime.timedelta(1, 2),
    [datetime.date(2020, 1, 2), datetime.date(2021, 3, 4), Fraction(1, 2), Fraction(3, 4)],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}")
def test_what_is_plain_comes_back_the_same(value: object) -> None:
    back = decode(encode(value))
    assert type(back) is type(value) and back == value and repr(back) == repr(value)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.dates()
    | st.fractions()
    | st.timedeltas(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(max_examples=30)
@given(plain)
def test_any_plain_value(value: object) -> None:
    assert repr(decode(encode(value))) == repr(value)


def test_builtins_that_an_answer_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.list", tuple)
    assert decode(encode([1])) == [1]


def test_nan_and_identity() -> None:
    shared: list = [float("nan")]
    first, second, (third,) = decode(encode([shared, shared, (shared,)]))
    assert first is second is third and math.isnan(first[0])
    loop: list = []
    loop.append(loop)
    back = decode(encode(loop))
    assert back[0] is back


@given(st.sets(st.integers() | st.text(max_size=3), max_size=40), st.sets(st.integers(), max_size=20))
def test_order_of_sets(items: set, taken: set) -> None:
    for value in (items - taken, frozenset(items | taken), set(sorted(items, key=repr))):
        back = decode(encode(value), in_order=True)
        assert list(back) == list(value) and back == value and isinstance(back, type(value))
        assert list(decode(encode(back), in_order=True)) == list(value)
    back = decode(encode(items), in_order=True)
    back.add("new member")
    assert sorted(map(repr, back)) == sorted(map(repr, items | {"new member"}))


class Same:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = object.__hash__


class Number(int):
    pass


class Counter(collections.Counter):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Same(),
        Number(1),
        Counter(),
        lambda: 1,
        object(),
        iter([]),
        (n for n in []),
        eval,
        Same,
        ...,
        [Same()],
        {1: Same()},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_plain_is_refused(value: object) -> None:
    with pytest.raises(NotPlain):
        encode(value)


def test_a_class_that_borrows_a_name_is_refused() -> None:
    false = type("Counter", (dict,), {"__eq__": lambda self, other: True})
    false.__module__ = "collections"
    with pytest.raises(NotPlain):
        encode(false())


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_BYTES", 10_000)
    monkeypatch.setattr(wire, "MAX_ITEMS", 1_000)
    deep: list = []
    for _ in range(wire.MAX_DEPTH + 1):
        deep = [deep]
    for value in (deep, bytes(wire.MAX_BYTES + 1), [0] * (wire.MAX_ITEMS + 1)):
        with pytest.raises(NotPlain):
            encode(value)


@given(st.binary(max_size=60))
def test_crafted_bytes_give_plain_data_or_an_error(data: bytes) -> None:
    try:
        encode(decode(data))
    except (BadMessage, NotPlain):
        return


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i",
        b"l\xff\xff\xff\xff",
        b"R\0\0\0\0",
        b"n\4\0\0\0eval",
        b"n\4\0\0\0exec",
        b"l\1\0\0\0" * 1000,
        b"N\0\0\0\0N\0\0\0\0",
        b"d\1\0\0\0\1",
        b"h\0\0\0\0",
        b"e\1\0\0\0l\0\0\0\0",
        b"Q\2\0\0\0i\1\0\0\0\1i\1\0\0\0\0",
        b"s\1\0\0\0\xff",
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)
