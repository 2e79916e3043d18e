"""`jaxlm eval` and `jaxlm compare`: measured models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from jaxlm.cli.arguments import JsonFlag, ModelPath
from jaxlm.cli.show import show
from jaxlm.errors import UserError

commands = typer.Typer()


@commands.command("eval")
def evaluate(
    run: ModelPath,
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="`position`: perplexity against position.")],
    length: Annotated[int, typer.Option(help="position: tokens of a text; 0: 8 times data.seq_len.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="position: also with this attention window.")] = 0,
    keep_first: Annotated[int, typer.Option(min=0, help="position: and with so many retained first tokens.")] = 4,
    texts: Annotated[int, typer.Option(help="position: texts side by side.")] = 16,
    buckets: Annotated[int, typer.Option(help="position: rows of the table.")] = 16,
    as_json: JsonFlag = False,
) -> None:
    """Measure a trained model; results are kept in RUN/eval."""
    from jaxlm.errors import did_you_mean
    from jaxlm.eval.perplexity import position

    for task in tasks:
        if task != "position":
            raise UserError(f"unknown task {task!r}", did_you_mean(task, ("position",)))
    options = {"window": window, "keep_first": keep_first, "texts": texts, "buckets": buckets}
    report = position(run, length=length, **options)
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        show(report)


@commands.command()
def compare(
    configs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG | SECTION.KEY=VALUE]...", help="Default: the four of configs/compare."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Steps of each; 0: as the configs say.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of report.html.")] = Path("runs/compare"),
) -> None:
    """Train architectures on the same text and budget, and show loss, speed and memory side by side."""
    from jaxlm.eval.compare import compare

    given = configs or []
    overrides = [one for one in given if "=" in one]
    show(compare([one for one in given if "=" not in one], overrides, out=out, steps=steps))
    print(f"{out / 'report.html'}")
