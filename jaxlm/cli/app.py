"""The command line: verbs of a few lines that call the library. A user's mistake is one line and exit code 2.

jaxlm train configs/quickstart.toml train.steps=100
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jaxlm import __version__
from jaxlm.cli import data, evaluate, launch, plan, sandbox, train, use, weights
from jaxlm.errors import UserError

app = typer.Typer(
    name="jaxlm",
    help="Train language models in JAX, run them in PyTorch, and prove that both are the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (train, use, weights, evaluate, plan, data, sandbox):
    app.add_typer(group.commands)
app.add_typer(launch.app, name="launch")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(f"jaxlm {__version__}")
        raise typer.Exit


def main() -> int:
    """Run the command line; returns the exit code."""
    code = _guarded(lambda: app(standalone_mode=True))
    if code and "jaxlm.processes.meet" in sys.modules:
        sys.modules["jaxlm.processes.meet"].leave(code)
    return code


def _guarded(command: Callable[[], Any]) -> int:
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 141
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0
    return 0
