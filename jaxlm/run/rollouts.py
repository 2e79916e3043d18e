"""The samples of phases of reinforcement learning, kept in `rollouts/` of a run: one line of JSON each.

A file has the name of the first update that its samples are for. A run that resumes draws the same samples again, and
writes the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.errors import UserError

FOLDER = "rollouts"


class Rollouts(NamedTuple):
    """The kept samples of one phase."""

    step: int
    """The first update that they are for."""
    rows: list[dict[str, Any]]
    """`prompt`, `answer`, `text`, `tokens` (their number), `ended` (`end` or `length`), `grades` by the names of the
    rewards, `reward` (None where a grade is missing), and means over its tokens: `advantage`, `logp` under the policy
    that drew it, `reference_logp` (None without a reference)."""


def write_rollouts(run_dir: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Keep the samples that the updates from `step` on are made of."""
    path = run_dir / FOLDER / f"{step:08d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def kept_steps(run_dir: Path) -> list[int]:
    """The first updates of the phases whose samples a run keeps, in order."""
    return sorted(int(file.stem) for file in (run_dir / FOLDER).glob("*.jsonl"))


def read_rollouts(run_dir: Path, step: int = 0) -> Rollouts:
    """The kept samples of the phase nearest before update `step`; 0: the last ones.

    Raises:
        UserError: there are none, or none so early.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder", "name a run of reinforcement learning")
    steps = kept_steps(run_dir)
    if not steps:
        raise UserError(
            f"{run_dir}: no samples are kept here", "runs of reinforcement learning keep them, where rl.keep_every > 0"
        )
    fitting = [first for first in steps if not step or first <= step]
    if not fitting:
        raise UserError(f"{run_dir}: no samples are kept of step {step}", f"the first are of step {steps[0]}")
    lines = (run_dir / FOLDER / f"{fitting[-1]:08d}.jsonl").read_text(encoding="utf-8").split("\n")
    return Rollouts(fitting[-1], [json.loads(line) for line in lines if line])  # a text may hold other line ends


def best_and_worst(rows: Sequence[dict[str, Any]], count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples of the largest and of the smallest rewards, by their advantages where these are equal.

    A sample without a reward is neither. None is in both.
    """
    graded = [row for row in rows if row["reward"] is not None]
    ordered = sorted(graded, key=lambda row: (-row["reward"], -row["advantage"]))
    best = ordered[:count]
    return best, ordered[len(best) :][::-1][:count]
