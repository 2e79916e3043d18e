"""Prompts of reinforcement learning to look at, with their ids and answers: `jaxlm data inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlm import config
from jaxlm.data.prompts import HELD_OUT, Task
from jaxlm.data.turns.inspect import coloured
from jaxlm.recipes.rollouts.asking import Asking


@dataclasses.dataclass(frozen=True)
class ShownPrompt:
    """One prompt, and the answer that its reward knows."""

    number: int
    """Among the prompts of the run."""
    prompt: str
    answer: str
    prompt_ids: list[int]
    """With the marks of the template."""
    answer_ids: list[int]
    """With the end. A sample is drawn; only the recipe `answers` trains on these."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class PromptReport:
    """The prompts of a stage."""

    task: str
    template: str
    sizes: str
    """How large both parts are, in words."""
    seq_len: int
    asking: Asking
    rows: tuple[ShownPrompt, ...]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        shown: list[Any] = [
            Text(f"prompts {self.task}", style="bold"),
            self.sizes,
            f"template: {self.template or 'none, prompts are plain text'}",
        ]
        for row in self.rows:
            ids, first = [*row.prompt_ids, *row.answer_ids], len(row.prompt_ids)
            weights = [float(place >= first) for place in range(1, len(ids))]
            arrays = {"tokens": ids[:-1], "targets": ids[1:], "segments": [1] * len(weights), "weights": weights}
            title = (
                f"prompt {row.number}: {first} tokens, its answer {len(ids) - first}, of data.seq_len {self.seq_len}"
            )
            shown += [Text(f"{title}; [id], the answer is green", style="bold")]
            shown += [coloured(self.asking.tokenizer, arrays)]
        return Group(*shown)


def report_of(cfg: config.Config, task: Task, asking: Asking, numbers: Sequence[int]) -> PromptReport:
    """The prompts of a task with these numbers, and the sizes of its parts."""
    prompts = [task.train(cfg.seed, number) for number in numbers]
    rows = [
        ShownPrompt(number, one.text, one.answer, ids, asking.answer(one.answer))
        for number, one, ids in zip(numbers, prompts, asking.encode([one.text for one in prompts]), strict=True)
    ]
    sizes = f"generated without end; one text of {HELD_OUT} is held out"
    if task.records:
        held_out = len(task.records) - len(task.kept)
        sizes = f"{len(task.kept):,} prompts to train on, {held_out:,} held out"
    return PromptReport(task.name, cfg.rl.template, sizes, cfg.data.seq_len, asking, tuple(rows))
