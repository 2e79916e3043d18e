"""Templates from anywhere: errors in one line, no endless loop, no huge value, nothing but text."""

from __future__ import annotations

import pytest

from jaxlm.errors import UserError
from jaxlm.text import chat_template
from jaxlm.text.chat_template import Template

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "turns of loops"),
        ("{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "turns of loops"),
        ("{% macro f(n) %}{{ f(n - 1) }}{% endmacro %}{{ f(80) }}", "recursion"),
        ("{{ 'x' * 1000000000 }}", "more than 8,000,000"),
        ("{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "8,000,000"),
        ("{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "8,000,000"),
        ("{{ 'a' | center(100000000) }}", "the number 100,000,000"),
        ("{{ 'a'.ljust(100000000) }}", "the number 100,000,000"),
        ("{{ '%100000000d' % 1 }}", "a width of five digits"),
        ("{{ 10 ** 10 ** 10 }}", r"\*\*"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(x=1) %}{% set n.__class__ = 1 %}", "__class__"),
        ("{{ messages[5].content.strip() }}", "no element 5"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_bad_template_is_one_line_and_ends(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_STEPS", 2000)  # calls are slow where every one is checked
    with pytest.raises(UserError, match=message) as caught:
        Template(source, "bad.jinja").render(MESSAGES)
    assert str(caught.value).startswith("bad.jinja") and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | no_such_filter }}", "{% endif %}", "{{"])
def test_a_syntax_error_names_its_line(source: str) -> None:
    with pytest.raises(UserError, match=r"bad.jinja: line 2: "):
        Template("\n" + source, "bad.jinja")


def test_spans_of_generation_and_of_spelled_specials() -> None:
    template = Template(
        "{% for m in messages %}[{% generation %}{{ m.content | trim }}{% endgeneration %}]{% endfor %}"
    )
    messages = [{"role": "user", "content": " a<s>b "}, {"role": "user", "content": "c"}]
    rendered = template.render(messages, specials=["<s>"])
    assert rendered.text == "[a<s>b][c]"
    assert rendered.generated == [(1, 6), (8, 9)]
    assert rendered.literal == [(2, 5)]


def test_marks_in_a_message_forge_nothing() -> None:
    template = Template("{{ messages[0].content }}{% generation %}x{% endgeneration %}")
    forged = "".join(chr(0xF0000 + n) for n in range(4))
    rendered = template.render([{"role": "user", "content": forged + "a"}])
    assert rendered.text == "ax" and rendered.generated == [(1, 2)] and not rendered.literal
