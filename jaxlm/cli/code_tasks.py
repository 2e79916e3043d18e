"""The code tasks of `jaxlm eval`, called by its verb."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from jaxlm.cli.show import show
from jaxlm.errors import UserError
from jaxlm.eval.code.evaluate import CodeOptions, judge_file, measure
from jaxlm.eval.code.generation import Generation


def numbers(text: str) -> tuple[int, ...]:
    """Read `1,10`. Raises: UserError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--k {text[:80]} is no list of numbers", "such as 1,10")
    return tuple(sorted({int(part) for part in parts}))


def run(words: list[str], samples: Path | None, options: CodeOptions, how: Generation, as_json: bool) -> None:
    """Judge a file of samples, or let the model of the first word solve the tasks named by the others."""
    options = replace(options, generation=how)
    if samples:
        if len(words) != 1:
            raise UserError(f"--from judges one task, not {len(words)}", "jaxlm eval --from samples.jsonl humaneval")
        reports = [judge_file(words[0], samples, options, _progress())]
    else:
        reports = measure(words[0], words[1:], options, _progress())
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for report in reports:
        print(json.dumps(report.to_json())) if as_json else show(report)


def _progress():
    if not sys.stderr.isatty():
        return None

    def step(name: str, done: int, total: int) -> None:
        print(f"\r\033[K{name} {done:,} of {total:,}", end="", file=sys.stderr, flush=True)

    return step
