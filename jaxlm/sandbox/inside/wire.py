"""Plain data as bytes, and back, and the channels that carry it: the only thing that passes between the process of the
answer and the process of the tests.

Only exact types are written. A subclass, a function of the answer or an object with methods of its own raises
`NotPlain`, so an answer cannot send a value that compares as it likes. Reading makes nothing but these types, whatever
the bytes are: nothing is unpickled. Containers that occur twice in a message are one object on the other side too.
Standard library only, and `collections`, `decimal` and so on are imported when a message has their types, because a
box starts for every answer. For the same reason the modules of a box import no `__future__`.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself would cost milliseconds in every box
    from collections.abc import Callable, Iterator
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


def _name(value: Any) -> bytes:
    if value not in _NAMES:
        raise NotPlain(_describe(value))
    return _NAMES[value].encode()


def _named(data: bytes) -> Any:
    value = _BUILTINS[data.decode()]
    if value not in _NAMES:
        raise BadMessage("a name that may not cross")
    return value


def _pairs(value: dict) -> list:
    return [part for pair in dict.items(value) for part in pair]


def _clock(value: Any) -> list:
    if value.tzinfo is not None:
        raise NotPlain("a time with a time zone")
    return [value.hour, value.minute, value.second, value.microsecond]


def _factory(value: Any) -> Any:
    made = value.default_factory
    return made if type(made) is type and made in _NAMES else None


_SIGNED: Any = {"byteorder": "little", "signed": True}
_TEXT = ("utf-8", "surrogatepass")
_ATOMS = {
    type(None): (b"N", lambda value: b"", lambda data: None),
    bool: (b"B", lambda value: b"1" if value else b"", bool),
    int: (b"i", lambda n: n.to_bytes(n.bit_length() // 8 + 1, **_SIGNED), lambda data: int.from_bytes(data, **_SIGNED)),
    float: (b"d", lambda value: value.hex().encode(), lambda data: float.fromhex(data.decode())),
    str: (b"s", lambda value: value.encode(*_TEXT), lambda data: data.decode(*_TEXT)),
    bytes: (b"b", bytes, bytes),
    type: (b"n", _name, _named),
    type(len): (b"n", _name, _named),
}
"""Kinds without parts: the tag, the value as bytes, and back."""
_READ = {tag: read for tag, _, read in _ATOMS.values()}

_COMPOUND = {
    ("builtins", "list"): (b"l", list),
    ("builtins", "tuple"): (b"t", list),
    ("builtins", "set"): (b"e", list),
    ("builtins", "frozenset"): (b"z", list),
    ("builtins", "dict"): (b"m", _pairs),
    ("builtins", "complex"): (b"c", lambda value: [value.real, value.imag]),
    ("builtins", "range"): (b"r", lambda value: [value.start, value.stop, value.step]),
    ("collections", "Counter"): (b"C", _pairs),
    ("collections", "OrderedDict"): (b"O", _pairs),
    ("collections", "defaultdict"): (b"D", lambda value: [_factory(value), *_pairs(value)]),
    ("collections", "deque"): (b"q", lambda value: [value.maxlen, *value]),
    ("decimal", "Decimal"): (b"X", lambda value: [str(value)]),
    ("fractions", "Fraction"): (b"Q", lambda value: [value.numerator, value.denominator]),
    ("datetime", "date"): (b"y", lambda value: [value.year, value.month, value.day]),
    ("datetime", "time"): (b"H", _clock),
    ("datetime", "datetime"): (b"Y", lambda value: [value.year, value.month, value.day, *_clock(value)]),
    ("datetime", "timedelta"): (b"I", lambda value: [value.days, value.seconds, value.microseconds]),
}
"""Kinds with parts, by module and name: the tag, and the parts of which the other side makes the value again."""
_KIND_OF_TAG = {tag: kind for kind, (tag, _) in _COMPOUND.items()}
_GROWING = b"lmCOD"
"""Tags of what is made empty and then filled, so that it can contain itself."""


def _describe(value: Any) -> str:
    kind = type(value)
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', '?')}"[:200]


def _kind(module: str, name: str) -> Any:
    return _BUILTINS.get(name) if module == "builtins" else getattr(sys.modules.get(module), name, None)


def _compound(kind: Any) -> "tuple[bytes, Callable[[Any], list]] | None":
    """Find the tag and the parts of a kind; None where it is not exactly one of the table."""
    kind = kind.kind if kind is _OrderedSet or kind is _OrderedFrozenset else kind
    place = kind.__module__, kind.__qualname__
    return _COMPOUND[place] if place in _COMPOUND and _kind(*place) is kind else None


class _Writer:
    def __init__(self, handles: "Callable[[Any], int | None] | None" = None) -> None:
        self.handles = handles
        self.parts: list[bytes] = []
        self.size = 0
        self.items = 0
        self.numbers: dict[int, int] = {}  # id of a compound of the caller's -> its number in the message

    def put(self, tag: bytes, number: int, data: bytes = b"") -> None:
        self.size += 5 + len(data)
        if self.size > MAX_BYTES:
            raise NotPlain(f"more than {MAX_BYTES >> 20} MB of data")
        self.parts.append(tag + number.to_bytes(4, "little") + data)

    def value(self, value: Any, depth: int = 0) -> None:
        self.items += 1
        if depth > MAX_DEPTH or self.items > MAX_ITEMS:
            raise NotPlain(f"data nested more than {MAX_DEPTH} deep, or more than {MAX_ITEMS} values")
        if type(value) in _ATOMS:
            tag, write, _ = _ATOMS[type(value)]
            data = write(value)
            self.put(tag, len(data), data)
        elif id(value) in self.numbers:
            self.put(b"R", self.numbers[id(value)])
        elif entry := _compound(type(value)):
            self.compound(value, *entry, depth)
        elif self.handles and (number := self.handles(value)) is not None:
            self.put(b"h", number)
        else:
            raise NotPlain(_describe(value))

    def compound(self, value: Any, tag: bytes, parts_of: "Callable[[Any], list]", depth: int) -> None:
        if tag in _GROWING:
            self.numbers[id(value)] = len(self.numbers)
        parts = parts_of(value)
        self.put(tag, len(parts))
        for part in parts:
            self.value(part, depth + 1)
        self.numbers.setdefault(id(value), len(self.numbers))


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

    def value(self, depth: int = 0) -> Any:
        self.items += 1
        if depth > MAX_DEPTH + 2 or self.items > MAX_ITEMS + 2:
            raise BadMessage("too deep or too long")
        tag, number = self.take(1), int.from_bytes(self.take(4), "little")
        if tag in _READ:
            return _READ[tag](self.take(number))
        if tag == b"R":
            return self.seen[number]
        if tag == b"h" and self.handles:
            return self.handles(number)
        if tag not in _KIND_OF_TAG:
            raise BadMessage(f"tag {tag!r}")
        __import__(_KIND_OF_TAG[tag][0])
        kind = _kind(*_KIND_OF_TAG[tag])
        parts = (self.value(depth + 1) for _ in range(number))
        return self.grown(tag, kind, parts) if tag in _GROWING else self.built(tag, kind, list(parts))

    def grown(self, tag: bytes, kind: Any, parts: "Iterator[Any]") -> Any:
        made = kind(next(parts, None)) if tag == b"D" else kind()
        self.seen.append(made)
        if tag == b"l":
            made.extend(parts)
        else:
            for key in parts:
                made[key] = next(parts, None)
        return made

    def built(self, tag: bytes, kind: Any, parts: list) -> Any:
        if tag in b"ez" and self.in_order:
            made = _same_order(kind, parts)
        elif tag in b"tez":
            made = kind(parts)
        else:
            made = kind(parts[1:], parts[0]) if tag == b"q" else kind(*parts)
        self.seen.append(made)
        return made


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


def read_all(number: int) -> bytes:
    """Read a descriptor to its end and close it."""
    parts = []
    while part := os.read(number, 1 << 20):
        parts.append(part)
    os.close(number)
    return b"".join(parts)


def read_exactly(number: int, size: int) -> bytes:
    """Read so many bytes of a descriptor. Raises: EOFError, when the other side is gone."""
    data = bytearray()
    while len(data) < size:
        part = os.read(number, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        data += part
    return bytes(data)


def write_all(number: int, data: bytes | bytearray) -> None:
    """Write everything. Raises: OSError, when the other side is gone."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(number, rest) :]


def memory_file(name: str, data: bytes) -> int:
    """Make a file outside of all folders that holds some bytes. Returns its descriptor, at the beginning."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create(name)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:
            number = os.dup(file.fileno())
    write_all(number, data)
    os.lseek(number, 0, os.SEEK_SET)
    return number


class Channel:
    """Messages over a socket: four bytes of length, then an encoded message."""

    def __init__(self, number: int) -> None:
        self.number = number

    def send(self, payload: bytes) -> None:
        """Send an encoded message."""
        write_all(self.number, len(payload).to_bytes(4, "little") + payload)

    def receive(self) -> bytes | None:
        """Receive an encoded message, or None when the other side is gone. Raises: BadMessage."""
        try:
            size = int.from_bytes(read_exactly(self.number, 4), "little")
            if size > MAX_BYTES + 1024:
                raise BadMessage("a message longer than allowed")
            return read_exactly(self.number, size)
        except (ConnectionError, EOFError):
            return None
