"""The role `tests`: run the tests of a problem against a program in another box, and decide the verdict.

`candidate(...)` here sends its arguments over a pipe and returns what comes back. The verdict leaves by a socket that
the program has never seen.
"""

import os
import sys

from . import worker
from .wire import BadMessage, Channel, NotPlain, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TESTS_FILE = "<tests>"
MAX_SHOWN = 300
ENDINGS = ("syntax", "not_plain", "no_function", "output", "cpu_time")
"""Verdicts that the program's own process knows."""
TRIED = ("network", "file", "fork", "signal", "system call")


class Verdict(BaseException):
    """The verdict is known. Not an Exception, so that tests which catch everything cannot hide it."""

    def __init__(self, kind: str, **details: object) -> None:
        super().__init__(kind)
        self.record = {"kind": kind, **details}


class AnswerError(Exception):
    """The program raised something that is no builtin exception."""


class Remote:
    """An object of a class of the program, held by number: reading and setting attributes goes over the pipe."""

    def __init__(self, link: "Link", number: int) -> None:
        vars(self).update(_link=link, _number=number)

    def __getattr__(self, name: str) -> object:
        return vars(self)["_link"].ask("getattr", "", [self, name], {})

    def __setattr__(self, name: str, value: object) -> None:
        vars(self)["_link"].ask("setattr", "", [self, name, value], {})


def shown(value: object) -> str:
    """Show a value in at most 300 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):
        text = f"<{type(value).__name__} too large to show>"
    if len(text) > MAX_SHOWN:
        text = f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
    return text.encode("utf-8", "backslashreplace").decode()


class Link:
    """Calls to the program in the other box."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.calls = 0
        self.verdict: Verdict | None = None
        self.raised: BaseException | None = None
        self.details: dict = {}
        self.last_call, self.last_result = "", ""

    def end(self, kind: str, **details: object) -> Verdict:
        """Fix the verdict: whatever the tests do afterwards, it stays."""
        self.verdict = self.verdict or Verdict(kind, call=self.last_call, **details)
        return self.verdict

    def reply(self) -> object:
        """Wait for the program's next message. Returns plain data or a `Remote`. Raises: the program's exception."""
        if self.verdict:
            raise self.verdict
        try:
            message = self.channel.receive()
            if message is None:
                raise self.end("gone")
            reply = decode(message, in_order=True, handles=lambda number: Remote(self, number))
            kind, value, self.details = _checked(reply)
        except (BadMessage, TypeError, ValueError) as error:
            raise self.end("not_plain", text=f"the program wrote into its channel: {error}") from None
        if kind == "returned":
            return value
        raise self.exception(value) if kind == "raised" else self.end(kind, **self.details)

    def ask(self, operation: str, name: str, arguments: list, named: dict) -> object:
        """Call, or read or set an attribute. Returns and raises as `reply` does."""
        words = [*map(shown, arguments), *(f"{key}={shown(value)}" for key, value in named.items())]
        self.last_call, self.last_result = f"{name}({', '.join(words)})"[: 2 * MAX_SHOWN], ""
        try:
            request = encode((operation, name, list(arguments), named), _number)
            self.calls += 1
            self.channel.send(request)
        except NotPlain as error:
            text = f"the tests pass an argument that is not plain data: {error}"
            raise self.end("harness_error", text=text) from None
        except ConnectionError:
            raise self.end("gone") from None
        value = self.reply()
        self.last_result = shown(value)
        return value

    def exception(self, names: list) -> BaseException:
        """Rebuild an exception: the nearest builtin type and the text."""
        self.details["type"], text = names[0][:100], self.details["text"]
        builtin = vars(sys.modules["builtins"])
        kinds = [builtin[name] for name in names if isinstance(builtin.get(name), type)]
        kinds = [kind for kind in kinds if issubclass(kind, BaseException)]
        if names[0] == "MemoryError":
            return self.end("memory", **self.details)
        if not kinds or not issubclass(kinds[0], Exception):  # sys.exit and the like end the tests at once
            return self.end("exception", **self.details)
        try:
            self.raised = (kinds[0] if kinds[0] is not Exception else AnswerError)(text)
        except TypeError:
            self.raised = AnswerError(text)
        return self.raised


def _checked(reply: "Any") -> "tuple[str, Any, dict]":
    """Check a reply, for a program may have written anything into its channel, and details go into records.

    Returns: its kind, its value and the details. Raises: TypeError, ValueError.
    """
    kind, value, text, line, tried = reply if len(reply) != 2 else (*reply, "", 0, [])
    texts = value if kind == "raised" and type(value) is list else []
    if not (kind in ("returned", *ENDINGS) or texts) or {type(one) for one in [text, *texts]} != {str}:
        raise TypeError("no reply")
    if type(line) is not int or line.bit_length() > 30 or type(tried) is not list:
        raise TypeError("no details")
    return kind, value, {"text": text[:MAX_SHOWN], "line": line, "tried": [one for one in tried[:8] if one in TRIED]}


def _number(value: object) -> int | None:
    return vars(value)["_number"] if type(value) is Remote else None


def assertion(source: str, line: int) -> dict:
    """Describe the assertion at a line: its text and, for a comparison with a literal, the value wanted."""
    import ast

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or node.lineno):
            wanted = ""
            if isinstance(node.test, ast.Compare) and len(node.test.ops) == 1:
                wanted = ast.unparse(node.test.comparators[0])[:MAX_SHOWN]
            return {"assertion": ast.unparse(node)[: 2 * MAX_SHOWN], "wanted": wanted}
    return {"assertion": "", "wanted": ""}


def python(job: dict, link: Link) -> None:
    """Run Python tests. What the prompt defines is there, except the function that the program defines."""
    namespace = worker.module("tests")
    worker.execute(job["prelude"], "<prompt>", namespace)

    def proxy(name: str) -> object:
        return lambda *arguments, **named: link.ask("call", name, list(arguments), named)

    for name in job["names"]:
        namespace[name] = proxy(name)
    namespace["candidate"] = namespace[job["names"][0]]
    worker.seed_random(job["tests"] + job["prelude"])
    worker.execute(job["tests"], TESTS_FILE, namespace)


def judge(job: dict, link: Link) -> dict:
    """Run the tests and say how they ended."""
    try:
        link.reply()  # the program is loaded
        if job["language"] == "bash":
            from . import bash_tests

            bash_tests.run(job, link)
        else:
            python(job, link)
    except Verdict as verdict:
        return verdict.record
    except BaseException as error:
        return from_exception(job, link, error)
    if link.verdict:
        return link.verdict.record
    if link.calls == 0:
        return {"kind": "harness_error", "text": "the tests never called the program"}
    return {"kind": "passed"}


def from_exception(job: dict, link: Link, error: BaseException) -> dict:
    """Turn an exception that ended the tests into a verdict."""
    if link.verdict:
        return link.verdict.record
    if error is link.raised:
        return {"kind": "exception", "call": link.last_call, **link.details}
    line = worker.line_in(TESTS_FILE, error)
    if type(error) is AssertionError and line:
        details = assertion(job["tests"], line)
        details |= {"call": link.last_call, "got": link.last_result, "tried": link.details["tried"]}
        return {"kind": "failed", **details, "text": str(error)[:MAX_SHOWN]}
    if isinstance(error, MemoryError):
        return {"kind": "memory", "call": link.last_call, "text": "in the tests"}
    if link.calls == 0:
        return {"kind": "harness_error", "text": f"the tests raised {type(error).__name__}: {shown(str(error))}"}
    details = {"call": link.last_call, "type": type(error).__name__, "text": f"in the tests: {shown(str(error))}"}
    return {"kind": "exception", **details}


def main(job: dict) -> None:
    """Judge, and send the verdict over the status pipe."""
    record = judge(job, Link(Channel(job["channel"])))
    Channel(job["status"]).send(encode(record))
    os._exit(0)
