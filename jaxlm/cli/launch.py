"""`jaxlm launch ...`: verbs that start the processes of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jaxlm.cli.launch_schedulers import app as schedulers

app = typer.Typer(help="Start the processes of a run.", no_args_is_help=True)
app.add_typer(schedulers)


@app.command()
def local(
    words: Annotated[list[str], typer.Argument(metavar="-- VERB ...", help="What each process runs: train CONFIG ...")],
    processes: Annotated[int, typer.Option(min=1, help="How many processes.")] = 1,
    devices_per_process: Annotated[
        int, typer.Option(min=0, help="Virtual CPU devices of each; 0: the accelerator with its number, else the CPU.")
    ] = 0,
    restarts: Annotated[int, typer.Option(min=0, help="Start again so often after a failure, with --resume.")] = 0,
    grace: Annotated[float, typer.Option(min=0, help="Seconds from SIGTERM to SIGKILL for those that remain.")] = 10.0,
    logs: Annotated[Path | None, typer.Option(help="Folder of process-N.log; default: logs/ in the run.")] = None,
) -> None:
    """Start a verb as several processes on this machine; the exit code is the one of the first that fails."""
    from jaxlm.launch.local import launch

    options = {"devices": devices_per_process, "restarts": restarts, "grace": grace, "logs": logs}
    code = launch(words, processes=processes, **options)
    if code:
        raise typer.Exit(code)
