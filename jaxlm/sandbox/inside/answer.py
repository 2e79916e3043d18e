"""The role `answer`: hold a program that a model wrote, and call its functions when the tests ask."""

import os
import sys

from . import worker
from .wire import Channel, NotPlain, decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

SIGXCPU = 24  # `signal` would cost a fifth of the start of a box
MAX_TEXT = 2_000
MAX_OUTPUT = 1 << 20
TRIED = {"socket": "network", "subprocess": "fork", "pty": "fork", "ctypes": "system call"}
TRIED_OS = {
    **dict.fromkeys(["fork", "forkpty", "posix_spawn", "exec", "system", "spawn", "startfile"], "fork"),
    **dict.fromkeys(["kill", "killpg"], "signal"),
    **dict.fromkeys(
        ["remove", "rename", "mkdir", "rmdir", "chmod", "chown", "link", "symlink", "truncate", "listdir"], "file"
    ),
}


def watch_attempts(tried: list, work: str, readable: tuple) -> None:
    """Note what the program tries that a box refuses. It only names the reason; the box itself refuses."""

    def outside(path: object) -> bool:
        path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
        return (path.startswith("/") and not path.startswith((work, *readable))) or path.startswith("..")

    def hook(event: str, arguments: tuple) -> None:
        room, _, name = event.partition(".")
        what = TRIED.get(room) if room != "ctypes" or name == "call_function" else None
        if room == "os":
            what = TRIED_OS.get(name)
            if what == "file" and not (arguments and outside(arguments[0])):
                what = None
        elif event == "open" and outside(arguments[0]):
            what = "file"
        if what and what not in tried and len(tried) < 8:
            tried.append(what)

    sys.addaudithook(hook)


def _text(error: BaseException) -> str:
    try:
        return str.__str__(str(error))  # exactly a text
    except BaseException as other:  # __str__ is the answer's own
        return f"its text raised {type(other).__name__}"


def _line(error: BaseException) -> int:
    return worker.line_in(worker.ANSWER_FILE, error)


def reply(kind: str, value: object = None, text: str = "", line: int = 0, tried: "Sequence[str]" = ()) -> bytes:
    """Write what the tests read (`tests.Link.reply`): `returned`, `raised` with names of types, or a verdict."""
    return encode((kind, value, text[:MAX_TEXT], line, list(tried)))


class Program:
    """A loaded Python program and the objects of its classes that the tests hold by number."""

    def __init__(self, job: dict) -> None:
        self.classes = job["classes"]
        self.tried: list = []
        self.objects: list = []
        self.namespace = worker.module("answer")
        watch_attempts(self.tried, job["work"], tuple(job["readable"]))

    def load(self, source: str) -> bytes:
        """Run the program's top level."""
        try:
            worker.execute(source, worker.ANSWER_FILE, self.namespace)
        except BaseException as error:
            # Without a frame of the program it is the program itself that does not compile; a ValueError is for NUL.
            if isinstance(error, SyntaxError | ValueError) and _line(error) == 0:
                text, line = (error.msg, error.lineno) if isinstance(error, SyntaxError) else (_text(error), 0)
                return reply("syntax", text=str(text), line=line or 0)
            return self.raised(error)
        return reply("returned")

    def raised(self, error: BaseException) -> bytes:
        """Write an exception as names of its types, text and line."""
        names = [str(kind.__name__)[:100] for kind in type(error).__mro__[:20]]
        return reply("raised", names, _text(error), _line(error), self.tried)

    def number_of(self, value: object) -> int | None:
        """Number an object of a class that the tests make themselves."""
        if type(value).__name__ not in self.classes:
            return None
        self.objects.append(value)
        return len(self.objects) - 1

    def answer(self, request: bytes) -> bytes:
        """Do what a request of the tests asks."""
        operation, name, arguments, named = decode(request, handles=self.objects.__getitem__)
        if operation == "call" and not callable(self.namespace.get(name)):
            return reply("no_function")
        holds = operation != "call" or name in self.classes
        try:
            if operation == "call":
                value = self.namespace[name](*arguments, **named)
            else:
                value = {"getattr": getattr, "setattr": setattr}[operation](*arguments)
        except BaseException as error:
            return self.raised(error)
        try:
            details = ("", 0, list(self.tried)) if self.tried else ()  # left out, since each costs time in each call
            return encode(("returned", value, *details), self.number_of if holds else None)
        except NotPlain as error:
            return reply("not_plain", text=str(error), tried=self.tried)


class Script:
    """A bash program, started anew for each call with the arguments as `$1`, `$2` and so on."""

    def __init__(self, job: dict) -> None:
        self.shell, self.environment = job["shell"], job["environment"]
        self.file = os.path.join(job["work"], "answer.sh")

    def load(self, source: str) -> bytes:
        """Write the program into the box's own folder."""
        try:
            text = source.encode()
        except UnicodeEncodeError as error:
            return reply("syntax", text=str(error))
        with open(self.file, "wb") as file:
            file.write(text)
        return reply("returned")

    def answer(self, request: bytes) -> bytes:
        """Run the program once. Returns what it printed and its status."""
        _, _, arguments, _ = decode(request)
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writes, 1)
            os.closerange(3, 256)
            os.execve(self.shell, [self.shell, self.file, *arguments], self.environment)
        os.close(writes)
        output = bytearray()
        while len(output) <= MAX_OUTPUT and (part := os.read(reads, 1 << 16)):
            output += part
        os.close(reads)
        if len(output) > MAX_OUTPUT:
            return reply("output")
        _, state = os.waitpid(child, 0)
        if os.WIFSIGNALED(state) and os.WTERMSIG(state) == SIGXCPU:
            return reply("cpu_time")
        return reply("returned", [bytes(output), os.waitstatus_to_exitcode(state)])


def main(job: dict) -> None:
    """Load the program, tell the tests how that went, then serve calls until the tests are gone."""
    os.close(job["status"])
    channel = Channel(job["channel"])
    program = Script(job) if job["language"] == "bash" else Program(job)
    worker.seed_random(job["program"] if job["language"] == "python" else "")
    channel.send(program.load(job["program"]))
    while (request := channel.receive()) is not None:
        channel.send(program.answer(request))
    os._exit(0)


def run(job: dict) -> None:
    """Run a whole program as `python FILE` or `bash FILE` would."""
    os.close(job["status"])
    source = job["program"]
    if job["language"] == "bash":
        file = os.path.join(job["work"], "program.sh")
        with open(file, "wb") as stream:
            stream.write(source.encode(errors="surrogateescape"))
        if not os.path.exists(job["shell"]):
            sys.exit(f"{job['shell']} is missing in the box")
        os.execve(job["shell"], [job["shell"], file], job["environment"])
    namespace = worker.module("__main__")

    def show(kind: type, error: BaseException, trace: "TracebackType | None") -> None:
        # The frames of the worker say nothing to the user.
        while trace is not None and trace.tb_frame.f_code.co_filename != worker.ANSWER_FILE:
            trace = trace.tb_next
        sys.__excepthook__(kind, error.with_traceback(trace), trace)

    sys.excepthook = show
    worker.execute(source, worker.ANSWER_FILE, namespace)
