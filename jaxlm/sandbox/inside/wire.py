"""Plain data as bytes, and back: the only thing that passes between the process of the answer and the process of the
tests.

Only exact types are written. A subclass, a function of the answer or an object with methods of its own raises
`NotPlain`, so an answer cannot send a value that compares as it likes. Reading makes nothing but these types, whatever
the bytes are: nothing is unpickled. Containers that occur twice in a message are one object on the other side too.
Standard library only, and `struct`, `collections`, `decimal` and so on are imported when a message has their types,
because a box starts for every answer. For the same reason the modules of a box import no `__future__`.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself would cost milliseconds in every box
    from collections.abc import Callable
    from typing import Any
else:
    Any = object

MAX_BYTES = 16 << 20
MAX_DEPTH = 150
MAX_ITEMS = 2_000_000

_BUILTINS = dict(vars(sys.modules["builtins"]))  # as they were before any answer ran
_NAMES = {
    value: name
    for name, value in _BUILTINS.items()
    if isinstance(value, type)
    or name in {"len", "sum", "min", "max", "abs", "sorted", "any", "all", "ord", "chr", "round", "repr"}
}
_LIBRARY = {
    ("collections", "Counter"): b"C", ("collections", "defaultdict"): b"D", ("collections", "OrderedDict"): b"O",
    ("collections", "deque"): b"q", ("decimal", "Decimal"): b"X", ("fractions", "Fraction"): b"Q", ("datetime", "date"):
    b"y", ("datetime", "time"): b"H", ("datetime", "datetime"): b"Y", ("datetime", "timedelta"): b"I",
}  # fmt: skip
_REBUILT = {b"t": tuple, b"e": set, b"z": frozenset}


class NotPlain(Exception):
    """A value that may not cross. The text says what it is and where."""


class BadMessage(Exception):
    """Bytes that are no message."""


class _InOrder:
    """Iterate in the order of the sender as long as nothing changed."""

    order: tuple = ()
    kind: Any

    def __iter__(self) -> Any:
        whole: Any = self
        unchanged = len(self.order) == len(whole) and all(item in whole for item in self.order)
        return iter(self.order) if unchanged else self.kind.__iter__(self)

    def __repr__(self) -> str:
        shown = "{" + ", ".join(map(repr, self)) + "}" if self.order else ""
        return shown if shown and self.kind is set else f"{self.kind.__name__}({shown})"


class _OrderedSet(_InOrder, set):
    kind = set


class _OrderedFrozenset(_InOrder, frozenset):
    kind = frozenset


_LISTS = {list: b"l", tuple: b"t", set: b"e", frozenset: b"z", _OrderedSet: b"e", _OrderedFrozenset: b"z"}


def _same_order(kind: type, items: list) -> Any:
    """Rebuild a set whose order is that of `items`.

    The order of a set depends on how it grew, so several ways are tried.
    """
    for way in (items, dict.fromkeys(items), items[::-1]):
        made = kind(way)
        if list(made) == items:
            return made
    made: Any = (_OrderedSet if kind is set else _OrderedFrozenset)(items)
    made.order = tuple(items)
    return made


def _packed(*values: float) -> bytes:
    import struct

    return struct.pack(f"<{len(values)}d", *values)


def _unpacked(data: bytes) -> "tuple[float, ...]":
    import struct

    return struct.unpack(f"<{len(data) // 8}d", data)


class _Writer:
    def __init__(self, handles: "Callable[[Any], int | None] | None" = None) -> None:
        self.handles = handles
        self.parts: list[bytes] = []
        self.size = 0
        self.items = 0
        self.numbers: dict[int, int] = {}  # id of a container -> its number in the message

    def put(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > MAX_BYTES:
            raise NotPlain(f"more than {MAX_BYTES >> 20} MB of data")
        self.parts.append(data)

    def count(self, tag: bytes, number: int) -> None:
        self.put(tag + number.to_bytes(4, "little"))

    def block(self, tag: bytes, data: bytes) -> None:
        self.count(tag, len(data))
        self.put(data)

    def value(self, value: Any, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise NotPlain(f"data nested more than {MAX_DEPTH} deep")
        self.items += 1
        if self.items > MAX_ITEMS:
            raise NotPlain(f"more than {MAX_ITEMS} values")
        if self.simple(value) or self.container(value, depth):
            return
        number = self.handles(value) if self.handles else None
        if number is None:
            raise NotPlain(_describe(value))
        self.count(b"h", number)

    def simple(self, value: Any) -> bool:
        kind = type(value)
        if value is None or kind is bool:
            self.put(b"N" if value is None else b"T" if value else b"F")
        elif kind is int:
            self.block(b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        elif kind is float:
            self.put(b"d" + _packed(value))
        elif kind is complex:
            self.put(b"c" + _packed(value.real, value.imag))
        elif kind is str:
            self.block(b"s", value.encode("utf-8", "surrogatepass"))
        elif kind is bytes:
            self.block(b"b", value)
        elif kind in _NAMES_TYPES and value in _NAMES:
            self.block(b"n", _NAMES[value].encode())
        else:
            return False
        return True

    def container(self, value: Any, depth: int) -> bool:
        if id(value) in self.numbers:
            self.count(b"R", self.numbers[id(value)])
            return True
        kind = type(value)
        tag = _LISTS.get(kind)
        if kind is dict:
            self.pairs(b"m", value, depth)
        elif kind is range:
            self.put(b"r")
            for number in (value.start, value.stop, value.step):
                self.value(number, depth + 1)
        elif tag is not None:
            # What can change has its number first, so that it can contain itself; what cannot has it when it is
            # complete.
            if kind is list:
                self.numbers[id(value)] = len(self.numbers)
            items = list(value)
            self.count(tag, len(items))
            for item in items:
                self.value(item, depth + 1)
            self.numbers.setdefault(id(value), len(self.numbers))
        else:
            return self.library(value, depth)
        return True

    def pairs(self, tag: bytes, value: dict, depth: int) -> None:
        self.numbers[id(value)] = len(self.numbers)
        items = list(dict.items(value))
        self.count(tag, len(items))
        for key, item in items:
            self.value(key, depth + 1)
            self.value(item, depth + 1)

    def library(self, value: Any, depth: int) -> bool:
        kind = type(value)
        tag = _LIBRARY.get((kind.__module__, kind.__qualname__))
        if tag is None or getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
            return False
        if tag in b"CO":
            self.pairs(tag, value, depth)
        elif tag == b"D":
            factory = value.default_factory
            self.block(tag, _NAMES[factory].encode() if type(factory) is type and factory in _NAMES else b"")
            self.pairs(b"m", value, depth)
        elif tag == b"q":
            self.put(tag)
            self.value([value.maxlen, *value], depth)
        elif tag == b"X":
            self.block(tag, str(value).encode())
        else:
            self.put(tag)
            self.value(_fields(tag, value), depth)
        return True


_NAMES_TYPES = {type, type(len)}


def _fields(tag: bytes, value: Any) -> list:
    if tag == b"Q":
        return [value.numerator, value.denominator]
    if tag == b"I":
        return [value.days, value.seconds, value.microseconds]
    date = [value.year, value.month, value.day] if tag in b"yY" else []
    if tag == b"y":
        return date
    if value.tzinfo is not None:
        raise NotPlain("a time with a time zone")
    return [*date, value.hour, value.minute, value.second, value.microsecond]


def _describe(value: Any) -> str:
    kind = type(value)
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', '?')}"[:200]


def encode(value: Any, handles: "Callable[[Any], int | None] | None" = None) -> bytes:
    """Write a plain value.

    Args:
        value: plain data.
        handles: gives the number of an object that stays where it is and crosses as a number; None for any other.

    Raises: NotPlain.
    """
    writer = _Writer(handles)
    try:
        writer.value(value)
    except RecursionError:
        raise NotPlain("data nested too deep") from None
    return b"".join(writer.parts)


class _Reader:
    def __init__(self, data: bytes, in_order: bool, handles: "Callable[[int], Any] | None" = None) -> None:
        self.data = data
        self.handles = handles
        self.in_order = in_order
        self.at = 0
        self.items = 0
        self.seen: list[Any] = []

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise BadMessage("cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def block(self) -> bytes:
        return self.take(self.number())

    def value(self, depth: int = 0) -> Any:
        self.items += 1
        if depth > MAX_DEPTH + 2 or self.items > MAX_ITEMS + 2:
            raise BadMessage("too deep or too long")
        tag = self.take(1)
        if tag in b"NTF":
            return {b"N": None, b"T": True, b"F": False}[tag]
        if tag == b"i":
            return int.from_bytes(self.block(), "little", signed=True)
        if tag == b"d":
            return _unpacked(self.take(8))[0]
        if tag == b"c":
            return complex(*_unpacked(self.take(16)))
        if tag == b"s":
            return self.block().decode("utf-8", "surrogatepass")
        if tag == b"b":
            return self.block()
        if tag == b"n":
            return self.named(self.block())
        if tag == b"R":
            return self.seen[self.number()]
        if tag == b"h" and self.handles:
            return self.handles(self.number())
        return self.container(tag, depth)

    def named(self, name: bytes) -> Any:
        value = _BUILTINS[name.decode()]
        if value not in _NAMES:
            raise BadMessage("a name that may not cross")
        return value

    def container(self, tag: bytes, depth: int) -> Any:
        if tag == b"r":
            return range(*(self.value(depth + 1) for _ in range(3)))
        if tag == b"l":
            made: list = []
            self.seen.append(made)
            for _ in range(self.number()):
                made.append(self.value(depth + 1))
            return made
        if tag in _REBUILT:
            items = [self.value(depth + 1) for _ in range(self.number())]
            kind = _REBUILT[tag]
            self.seen.append(
                rebuilt := _same_order(kind, items) if self.in_order and kind is not tuple else kind(items)
            )
            return rebuilt
        if tag == b"m":
            return self.pairs({}, depth)
        return self.library(tag, depth)

    def pairs(self, made: dict, depth: int) -> dict:
        self.seen.append(made)
        for _ in range(self.number()):
            key = self.value(depth + 1)
            made[key] = self.value(depth + 1)
        return made

    def library(self, tag: bytes, depth: int) -> Any:
        module, name = next((key for key, value in _LIBRARY.items() if value == tag), ("", ""))
        if not module:
            raise BadMessage(f"tag {tag!r}")
        kind = getattr(__import__(module), name)
        if tag in b"CO":
            return self.pairs(kind(), depth)
        if tag == b"D":
            factory = self.block()
            made = kind(self.named(factory) if factory else None)
            if self.take(1) != b"m":
                raise BadMessage("a defaultdict without its pairs")
            return self.pairs(made, depth)
        if tag == b"X":
            return kind(self.block().decode())
        fields = self.value(depth)
        if type(fields) is not list:
            raise BadMessage("no fields")
        return kind(fields[1:], fields[0]) if tag == b"q" else kind(*fields)


def decode(data: bytes, in_order: bool = False, handles: "Callable[[int], Any] | None" = None) -> Any:
    """Read what `encode` wrote. Whatever the bytes are, the result is plain data.

    Args:
        data: a message.
        in_order: sets keep the order of the sender, where needed as a subclass that differs in nothing else.
        handles: gives the object of a number that `encode` wrote in its place.

    Raises: BadMessage.
    """
    reader = _Reader(data, in_order, handles)
    try:
        value = reader.value()
    except (ArithmeticError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise BadMessage(f"{type(error).__name__}: {error}"[:200]) from None
    if reader.at != len(data):
        raise BadMessage("bytes behind the end")
    return value
