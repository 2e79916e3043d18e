"""`jaxlm train`."""

from __future__ import annotations

from typing import Annotated

import typer

from jaxlm.cli.arguments import Backend, BackendOption, ConfigPath, Overrides

commands = typer.Typer()


@commands.command()
def train(
    path: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run, or begin it if there is none.")] = False,
    backend: BackendOption = Backend.jax,
) -> None:
    """Train the model of CONFIG. The run directory is `out_dir`."""
    import jaxlm
    from jaxlm.config import paths, registry

    config = jaxlm.load_config(path, overrides or ())
    if resume:
        named = {override.partition("=")[0] for override in overrides or ()}
        config = paths.of_moved_run(config, registry.find(path), named)
    jaxlm.train(config, resume=resume, backend=backend.value)
