"""`jaxlm rollouts`: what a policy said while it was trained, and what that was worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxlm.cli.arguments import JsonFlag
from jaxlm.cli.show import show

commands = typer.Typer()


@commands.command()
def rollouts(
    run: Annotated[Path, typer.Argument(help="A run of reinforcement learning.", show_default=False)],
    step: Annotated[int, typer.Option(min=0, help="Samples that this update is made of; 0: the last ones.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many of the best, and of the worst.")] = 5,
    as_json: JsonFlag = False,
) -> None:
    """Show the samples of a step with rewards, advantages and log-probabilities, the best and the worst first."""
    from jaxlm.run.rollouts import best_and_worst, read_rollouts

    kept = read_rollouts(run, step)
    if as_json:
        for row in kept.rows:
            print(json.dumps({"step": kept.step, **row}, ensure_ascii=False))
        return
    rewards = [row["reward"] for row in kept.rows if row["reward"] is not None]
    mean = sum(rewards) / max(len(rewards), 1)
    print(
        f"step {kept.step}: {len(kept.rows)} samples, {len(kept.rows) - len(rewards)} ungraded, mean reward {mean:.4f}"
    )
    for name, rows in zip(("best", "worst"), best_and_worst(kept.rows, count), strict=True):
        show(_table(name, rows))


def _table(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    numbers = ("reward", "advantage", "log-prob", "- reference")
    table = Table(title=title, title_justify="left", show_lines=len(rows) < 20)
    for name in numbers:
        table.add_column(name, justify="right")
    for name in ("ended", "prompt", "sample", "grades"):
        table.add_column(name, overflow="fold")
    for row in rows:
        moved = "" if row["reference_logp"] is None else f"{row['logp'] - row['reference_logp']:+.4f}"
        shown = f"{row['reward']:.4f}", f"{row['advantage']:+.4f}", f"{row['logp']:.4f}", moved
        grades = ", ".join(f"{name} {value:.3g}" for name, value in row["grades"].items())
        table.add_row(*shown, row["ended"], Text(row["prompt"]), Text(row["text"]), grades)
    return table
