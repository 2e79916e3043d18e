"""Arguments and options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Backend(StrEnum):
    """The framework that computes."""

    jax = "jax"
    torch = "torch"


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A TOML file or a name.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Options that differ from the file.")
]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run, a torch_ref or Hugging Face folder, a model.bin, or a name on the hub.",
        show_default=False,
    ),
]
BackendOption = Annotated[Backend, typer.Option(help="Framework that computes.")]
SandboxName = Annotated[
    str,
    typer.Option(help="auto, bwrap, landlock, seatbelt, container:IMAGE, monty (lower bounds), none (not isolated)."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON.")]
