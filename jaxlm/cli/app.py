"""The command line: verbs of a few lines that call the library. A user's mistake is one line and exit code 2.

Any other exception is one line and exit code 1; with JAXLM_TRACEBACK=1 in the environment it comes with its traceback.
Exit codes: 0 done; 1 another error, or a check that found a difference; 2 something that the user must mend first, so
launchers do not start it again; 75 stopped by a signal with nothing unsaved, 124 hung: start again with --resume; 130
stopped by Ctrl-C, after saving.

jaxlm train configs/quickstart.toml train.steps=100
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, cast

import typer

from jaxlm import __version__
from jaxlm.cli import data, evaluate, launch, plan, rollouts, sandbox, train, use, weights
from jaxlm.errors import UserError
from jaxlm.processes.libtpu_silence import libtpu_silence
from jaxlm.processes.orbax_silence import OrbaxSilence

MISUSE = cast("type[Exception]", typer.BadParameter.__base__)
"""The parser's errors. They have no public name: typer has a copy of click of its own."""
TRACEBACK = "JAXLM_TRACEBACK"
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)  # no file can ever lie there: what the user wrote is wrong

app = typer.Typer(
    name="jaxlm",
    help="Train language models in JAX, run them in PyTorch, and prove that both are the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (train, use, weights, evaluate, rollouts, plan, data, sandbox):
    app.add_typer(group.commands)
app.add_typer(launch.app, name="launch")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(f"jaxlm {__version__}")
        raise typer.Exit


def main() -> int:
    """Run the command line; returns the exit code."""
    _replace_output()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of few characters shows \u00e9; none has half a pair
            stream.reconfigure(errors="backslashreplace")
    elsewhere = sys.argv[1:2] == ["launch"]  # its jobs take the environment to machines that may have TPUs
    with contextlib.nullcontext() if elsewhere else libtpu_silence(), speaking():
        code = _guarded(lambda: app(standalone_mode=False))
        if sys.stdout is not None:
            code = _guarded(sys.stdout.flush) or code
    if code and "jaxlm.processes.meet" in sys.modules:
        sys.modules["jaxlm.processes.meet"].leave(code)
    return code


class _Output(io.FileIO):
    """Standard output. Once it takes no more, what is printed is lost, so that Python has nothing to say at its end."""

    lost = False

    def write(self, data: Any) -> int | None:
        """Write bytes. Raises: UserError where the disk is full and the like; BrokenPipeError."""
        try:
            return memoryview(data).nbytes if self.lost else super().write(data)
        except OSError as error:
            self.lost = True
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"standard output: {error.strerror}", "make room, or send it elsewhere") from None


def _replace_output() -> None:
    """Let standard output say that it failed: a plain OSError could be that of any file."""
    plain = sys.stdout
    if plain is not sys.__stdout__ or not isinstance(plain, io.TextIOWrapper):
        return  # closed, or a test's
    raw = _Output(plain.fileno(), "w", closefd=False)
    through = plain.write_through
    stream: Any = raw if through else io.BufferedWriter(raw)
    options = {"encoding": plain.encoding, "newline": "\n", "line_buffering": plain.line_buffering}
    sys.stdout = io.TextIOWrapper(stream, **options, write_through=through)


@contextlib.contextmanager
def speaking() -> Iterator[None]:
    """Show what the library does: its notes are lines on stderr, and INFO also shows progress.

    Orbax and asyncio are silent: jaxlm says in one line what is wrong with a checkpoint.
    """
    ours, handler = logging.getLogger("jaxlm"), _Lines()
    if any(isinstance(known, _Lines) for known in ours.handlers):  # a verb within one that speaks already
        yield
        return
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        with OrbaxSilence():
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


class _Lines(logging.Handler):
    """A line on stderr for each record, wherever stderr is now."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _guarded(command: Callable[[], Any]) -> int:
    """Run a command; returns the exit code. `typer.Exit` comes as the number that the command returns."""
    try:
        code = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except MISUSE as error:
        return _misused(error)
    except typer.Abort:
        print("stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    except OSError as error:
        return _failed(error, mistake=error.errno in _NO_PATH)
    except Exception as error:  # the one boundary: whatever a library raises is printed in one line
        return _failed(error)
    return code if isinstance(code, int) else 0


def _misused(error: Any) -> int:
    """Print a command line that the parser refuses in a line; it has printed its help where no verb is named."""
    if type(error).__name__ != "NoArgsIsHelpError":
        text = " ".join(error.format_message().split()).removesuffix(".").replace("Value error, ", "")
        hint = f" ({error.ctx.command_path} --help)" if error.ctx else ""
        print(f"error: {text}{hint}", file=sys.stderr)
    return error.exit_code


def _failed(error: Exception, *, mistake: bool = False) -> int:
    """Print an exception that is not ours in a line; returns the exit code."""
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    print(f"error: {_in_a_line(error)} ({TRACEBACK}=1 shows where)", file=sys.stderr)
    return 2 if mistake else 1


def _in_a_line(error: Exception) -> str:
    """What happened and where, of an exception that is not ours."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    kind = type(error).__name__
    first = next(iter(str(error).strip().splitlines()), "")[:300]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "jaxlm" in frame.filename]
    where = f" in {frames[-1].name}" if frames else ""
    return f"{kind}{where}: {first}".encode(errors="backslashreplace").decode()
