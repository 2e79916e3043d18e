"""`jaxlm sandbox`: what isolates code on this machine, and programs run in it."""

from __future__ import annotations

import dataclasses
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlm.cli.arguments import JsonFlag, SandboxName
from jaxlm.cli.show import show
from jaxlm.errors import UserError

commands = typer.Typer()


class Language(StrEnum):
    """What a program is written in."""

    python = "python"
    bash = "bash"


@commands.command()
def sandbox(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[run FILE]", help="A program to run; none: the table of escapes.")
    ] = None,
    sandbox: SandboxName = "auto",
    python: Annotated[str, typer.Option(help="Python for the boxes; by default this one.")] = "",
    language: Annotated[Language | None, typer.Option(help="run: by default by the ending of the name.")] = None,
    cpu_seconds: Annotated[float, typer.Option(help="run: processor time.")] = 10.0,
    memory: Annotated[str, typer.Option(help="run: memory of all its processes, such as 512M or 2G.")] = "512M",
    as_json: JsonFlag = False,
) -> None:
    """Say what isolates code here and try all escapes now; or run FILE in a box, with standard input passed on.

    The exit code of a run is the program's, or 1 when a limit ended it.
    """
    from jaxlm.sandbox import Limits, choose

    if not words:
        _table(choose(sandbox, python), as_json)
    elif words[0] != "run" or len(words) != 2:
        raise UserError(f"jaxlm sandbox {' '.join(words)} means nothing", "jaxlm sandbox, or jaxlm sandbox run FILE")
    else:
        if not 0.1 <= cpu_seconds <= 86_400:
            raise UserError(f"--cpu-seconds {cpu_seconds:g} is out of range", "0.1 to 86400")
        limits = Limits(cpu_seconds=cpu_seconds, memory=_bytes(memory))
        _run(Path(words[1]), language, limits, choose(sandbox, python), as_json)


def _table(chosen: Any, as_json: bool) -> None:
    """Try the whole battery in a sandbox. Exits with 1 if an escape succeeds."""
    from jaxlm.sandbox.battery import escapes
    from jaxlm.sandbox.choose import BACKENDS, weakness

    if chosen.name == "none":
        raise UserError("the battery runs in isolation only, `none` has no table", "leave --sandbox out")
    backends = {}
    for name, backend in BACKENDS.items():
        reason = "isolates nothing; must be named" if name == "none" else backend.problem()
        backends[name] = reason or weakness(backend, chosen.interpreter) or "holds"
    tried = []
    spoken = [escape for escape in escapes.battery() if escape.language in chosen.backend.languages]
    for result in escapes.attempt_all(spoken, chosen):
        tried.append(result)
        if sys.stderr.isatty():
            print(f"\r\033[K{len(tried)} escapes tried", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    escaped = [result.escape.name for result in tried if result.succeeded]
    if as_json:
        rows = [{"name": one.escape.name, "tries": one.escape.tries, "seen": one.seen} for one in tried]
        record = {"sandbox": chosen.name, "python": chosen.interpreter.executable, "backends": backends}
        print(json.dumps({**record, "tried": len(tried), "escaped": escaped, "escapes": rows}))
    else:
        show(_backend_table(backends, chosen))
        show(_escape_table(tried, chosen.name))
    if escaped:
        raise typer.Exit(1)


def _backend_table(backends: dict[str, str], chosen: Any) -> Any:
    from rich.table import Table

    made = Table(title=f"isolation on this machine, Python {chosen.interpreter.version}", title_justify="left")
    for name in ("", "sandbox", "here"):
        made.add_column(name)
    for name, state in backends.items():
        made.add_row("*" if name == chosen.name else "", name, state)
    return made


def _escape_table(tried: list, name: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    count = sum(result.succeeded for result in tried)
    made = Table(title=f"{count} of {len(tried)} escapes and cheats succeed in {name}", title_justify="left")
    for column in ("", "name", "tries to", "what was seen"):
        made.add_column(column, overflow="fold")
    for one in tried:
        mark = "[red]ESCAPED[/red]" if one.succeeded else "held"
        made.add_row(mark, one.escape.name, escape(one.escape.tries), escape(one.seen[:60]))
    return made


def _run(file: Path, language: Language | None, limits: Any, chosen: Any, as_json: bool) -> None:
    """Run a program and leave with its exit code."""
    from jaxlm.sandbox import HarnessError, run

    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}", "FILE is a program in UTF-8") from None
    spoken = language.value if language else "bash" if file.suffix in {".sh", ".bash"} else "python"
    stdin = b"" if sys.stdin.isatty() else sys.stdin.buffer.read()
    try:
        ran = run(source, stdin, spoken, limits, chosen)
    except HarnessError as error:
        raise UserError(f"the box failed: {error}", "see `jaxlm sandbox`") from None
    if as_json:
        record = dataclasses.asdict(ran)
        texts = {name: record[name].decode(errors="replace") for name in ("stdout", "stderr")}
        print(json.dumps({**record, **texts}))
    else:
        sys.stdout.buffer.write(ran.stdout)
        sys.stdout.flush()
        sys.stderr.buffer.write(ran.stderr)
        if ran.kind != "finished":
            print(f"{ran.kind}: {ran.text} (sandbox: {ran.sandbox})", file=sys.stderr)
    raise typer.Exit(ran.status if ran.kind == "finished" and ran.status >= 0 else 1)


def _bytes(text: str) -> int:
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper(), 0)
    number = text[:-1] if factor else text
    size = int(number) * (factor or 1) if number.isdecimal() and len(number) < 16 else 0
    if not 64 << 20 <= size <= 1 << 40:
        raise UserError(f"--memory {text[:80]} is no size", "at least 64M and at most 1024G, such as 512M")
    return size
