"""Chat templates: Jinja in an immutable sandbox with limits, and which part of the text an assistant wrote.

The environment is that of transformers (trimmed blocks, `tojson`, `raise_exception`, `strftime_now` and
`{% generation %}`), so a template gives the same text. A template comes from anywhere: each turn of a loop and each
call of a macro is counted, texts and lists may not grow without bound, and the same template fails at the same place
on every machine.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jaxlm.errors import UserError

MAX_STEPS = 50_000
"""Turns of loops and calls of macros of one rendering: well under a second."""
MAX_SIZE = 8_000_000
"""Characters or entries of any value of a template, and of the text."""

# Characters of the private plane that no message has (they are taken out of every message before it is rendered).
_GENERATION, _END_GENERATION, _LITERAL, _END_LITERAL = (chr(0xF0000 + n) for n in range(4))
_MARKS = re.compile(f"[{_GENERATION}{_END_GENERATION}{_LITERAL}{_END_LITERAL}]")

Message = Mapping[str, Any]


class Rendered(NamedTuple):
    """The text of a conversation."""

    text: str
    generated: list[tuple[int, int]]
    """Where the template says that an assistant speaks, by characters."""
    literal: list[tuple[int, int]]
    """Where a message spells a special token: text, not the token."""


class Template:
    """A compiled chat template."""

    def __init__(self, source: str, where: str = "the chat template") -> None:
        """Compile a template.

        Raises:
            UserError: it has a syntax error; with the line.
        """
        self.source, self.where = source, where
        try:
            self._compiled = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where}: line {error.lineno}: {error.message}", "mend it, or name another one") from None
        except RecursionError:
            raise UserError(f"{where}: nested too deeply") from None

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself says where an assistant speaks."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        generation_prompt: bool = False,
        words: Mapping[str, str] | None = None,
        specials: Sequence[str] = (),
    ) -> Rendered:
        """The text of a conversation.

        Args:
            generation_prompt: end where the assistant's answer begins.
            words: `bos_token`, `eos_token` and others that the template may name.
            specials: spellings of special tokens, to find in the messages.

        Raises:
            UserError: the template refuses the conversation, fails, or takes too long.
        """
        spelled = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")
        steps = _Steps()
        try:
            marked = self._compiled.render(
                messages=[_with_reasoning(_marked(message, spelled)) for message in messages],
                tools=_marked(list(tools), spelled) if tools else None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **(words or {}),
                **{_TICK: steps},
            )
        except jinja2.TemplateError as error:
            raise UserError(f"{self.where}: {error.message or error}", "does it fit these messages?") from None
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError, ArithmeticError) as error:
            raise UserError(f"{self.where}: {type(error).__name__}: {error}", "does it fit these messages?") from None
        if len(marked) > MAX_SIZE:
            raise UserError(f"{self.where}: a text of more than {MAX_SIZE:,} characters")
        return _unmarked(marked)


def _unmarked(marked: str) -> Rendered:
    """The text without marks, and where they stood."""
    pieces: list[str] = []
    spans: dict[str, list[tuple[int, int]]] = {_GENERATION: [], _LITERAL: []}
    begins: dict[str, int] = {}
    at = length = 0
    for mark in _MARKS.finditer(marked):
        pieces.append(marked[at : mark.start()])
        length += len(pieces[-1])
        at = mark.end()
        if mark[0] in spans:
            begins[mark[0]] = length
            continue
        begin = _GENERATION if mark[0] == _END_GENERATION else _LITERAL
        if begin in begins:  # a template may have cut a message between two marks
            spans[begin].append((begins.pop(begin), length))
    return Rendered("".join([*pieces, marked[at:]]), spans[_GENERATION], spans[_LITERAL])


def _marked(value: Any, spelled: re.Pattern[str]) -> Any:
    """Plain JSON of what a template sees, with marks around the spellings of special tokens."""
    if isinstance(value, str):
        return spelled.sub(lambda found: f"{_LITERAL}{found[0]}{_END_LITERAL}", _MARKS.sub("", value))
    if isinstance(value, Mapping):
        return {str(key): _marked(inner, spelled) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(inner, spelled) for inner in value]
    return value if value is None or isinstance(value, bool | int | float) else f"<{type(value).__name__}>"


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The same reasoning under each of the names that templates read, as transformers has it."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


class TooLong(jinja2.TemplateError):
    """A template that would take too long or make too much."""


_TICK, _JOIN = "jaxlm_step", "jaxlm_join"


class _Steps:
    """Counts what a rendering does."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def __call__(self) -> str:
        self._left -= 1
        if self._left < 0:
            raise TooLong(f"more than {MAX_STEPS:,} turns of loops: it does not end")
        return ""


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_SIZE:
        raise TooLong(f"a value of more than {MAX_SIZE:,} entries")
    return value


def _join(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_SIZE:
        raise TooLong(f"a text of more than {MAX_SIZE:,} characters")
    return "".join(texts)


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, whose text is what an assistant writes."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (jinja's own type)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        return f"{_GENERATION}{caller()}{_END_GENERATION}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox whose values may not grow without bound."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Count a step in each body of a loop or macro: nothing else can go on for ever."""
        tree = super()._parse(source, name, filename)
        for node in (*tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)):
            step = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            node.body.insert(0, nodes.Output([step]).set_lineno(node.lineno))
            step.set_lineno(node.lineno)
        _join_by_function(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2.sandbox."""
        sizes = [len(side) if isinstance(side, str | list | tuple) else 0 for side in (left, right)]
        if operator == "*" and any(sizes):
            count = next((side for side in (left, right) if isinstance(side, int)), 0)
            if max(sizes) * count > MAX_SIZE:
                raise TooLong(f"a value of more than {MAX_SIZE:,} entries")
        if operator == "**" and (abs(left) > 1000 or abs(right) > 100):
            raise TooLong(f"{left} ** {right}")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{5}|\*)", left):
            raise TooLong("a width of five digits")
        return _bounded(super().call_binop(context, operator, left, right))

    def call(self, context: Any, callee: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        """See jinja2.sandbox."""
        _small_numbers(args, kwargs)
        return _bounded(super().call(context, callee, *args, **kwargs))


def _small_numbers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse numbers that could only be widths or counts beyond all bounds."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > MAX_SIZE:
            raise TooLong(f"it calls a function with the number {value:,}, at most {MAX_SIZE:,} is possible")


def _join_by_function(tree: nodes.Node) -> None:
    """Replace `a ~ b` by a call whose result is bounded."""
    for node in list(tree.find_all(nodes.Concat)):
        call = nodes.Call(nodes.Name(_JOIN, "load"), list(node.nodes), [], None, None)
        call.set_lineno(node.lineno)
        node.nodes = [call]


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes no huge number and returns no huge value."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _small_numbers(args, kwargs)
        return _bounded(function(*args, **kwargs))

    return guarded


class _Namespace(Namespace):
    """Jinja's namespace without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> _Sandbox:
    found = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    found.filters["tojson"] = _to_json
    found.filters = {name: _guarded(function) for name, function in found.filters.items()}
    found.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        _JOIN: _join,
    }
    return found
