"""Supervised learning of the right answers to a task's prompts: where reinforcement learning can start from.

    jaxlm train configs/rl/answers-add.toml

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.data.prompts import Prompt, open_task
from jaxlm.data.rows.validation import HeldOut
from jaxlm.data.stage_tokenizer import stage_tokenizer
from jaxlm.data.turns.inspect import rows_of_step
from jaxlm.errors import UserError
from jaxlm.recipes import pretrain
from jaxlm.recipes.rollouts.asking import Asking
from jaxlm.recipes.rollouts.inspect import PromptReport, report_of
from jaxlm.recipes.rollouts.phases import Batch, Drawn, lay
from jaxlm.text.tokenizer import Tokenizer
from jaxlm.train.recipe import LM_COLUMNS, MODEL, Judge, Models, Objective, Recipe, model_of_run, twin

HELD_OUT_BATCHES = 8
"""Of held-out prompts, where `eval.batches` does not limit them."""


def recipe(cfg: config.Config) -> Recipe:
    """The stage `answers`."""
    cfg.model.require_language_model("the recipe answers")
    return Recipe(
        columns=LM_COLUMNS,
        models=Models({MODEL: model_of_run(cfg)}),
        objective=Objective(pretrain.objective, twin("torch_ref.recipes.pretrain")),
        data=lambda own: AnswerData(cfg, own),
        judge=lambda _: Judge(figures, describe=described),
    )


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Of the answers to held-out prompts: nats a token, and how often the likeliest token is right."""
    return {
        "validation_loss": sums["nll"] / sums["weight"],
        "validation_accuracy": sums["accuracy"] / sums["weight"],
    }


def described(values: Mapping[str, float]) -> str:
    """One line for the terminal."""
    return f"loss {values['validation_loss']:.4f} nats a token, {values['validation_accuracy']:.1%} of the tokens right"


class AnswerData:
    """Prompt after prompt of `rl.task`, each with its answer; see `train.recipe.DataSource`."""

    updates_per_phase = 1

    def __init__(self, cfg: config.Config, own: Tokenizer | None = None) -> None:
        self.config, self.tokenizer = cfg, stage_tokenizer(cfg, own)
        self.task, self.asking = open_task(cfg.rl.task), Asking.of(cfg, self.tokenizer)
        # Of a file all prompts are known, and it is better refused now than in the middle of the run.
        first = [self.task.train(cfg.seed, number) for number in range(cfg.train.batch_size)]
        self._encoded([*(self.task.kept or first), *self._held_out(cfg.train.batch_size, cfg.eval.batches)])

    def identity(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer.fingerprint(), "task": self.task.name}

    def rows(self, prompts: Sequence[Prompt]) -> Batch:
        """A row for each prompt; its answer counts, with its end.

        Raises:
            UserError: a prompt and its answer do not fit into a row.
        """
        ids, answers = self._encoded(prompts)
        samples = [Drawn(*one, "end", "") for one in zip(prompts, ids, answers, strict=True)]
        return lay(samples, self.config.data.seq_len, self.tokenizer.pad)

    def _encoded(self, prompts: Sequence[Prompt]) -> tuple[list[list[int]], list[list[int]]]:
        """The ids of prompts and of their answers.

        Raises:
            UserError: one does not fit into a row with its answer; the longest is named.
        """
        ids = self.asking.encode([prompt.text for prompt in prompts])
        answers = [self.asking.answer(prompt.answer) for prompt in prompts]
        lengths, width = (
            [len(prompt) + len(answer) for prompt, answer in zip(ids, answers, strict=True)],
            self.config.data.seq_len,
        )
        if (longest := max(lengths, default=0)) > width:
            text = prompts[lengths.index(longest)].text
            raise UserError(
                f"rl.task = {self.task.name!r}: the prompt {text[:40]!r} and its answer of {longest} tokens do not fit "
                f"into data.seq_len = {width}",
                f"data.seq_len={longest}",
            )
        return ids, answers

    def inspect(self, *, step: int = 1, rows: int = 1) -> PromptReport:
        """The first prompts of a step, and the sizes of both parts.

        Raises:
            UserError: the step lies beyond the run.
        """
        numbers = rows_of_step(self.config.train, step, rows).tolist()
        return report_of(self.config, self.task, self.asking, numbers)

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> AnswerBatches:
        return AnswerBatches(self, batch_size, rows)

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        batches = functools.partial(self.held_out_batches, batch_size=batch_size, rows=rows, max_batches=max_batches)
        return [HeldOut("", True, batches)]

    def held_out_batches(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> Iterator[Batch]:
        prompts = self._held_out(batch_size, max_batches)
        for first in range(0, len(prompts), batch_size):
            batch = self.rows(prompts[first : first + batch_size])
            missing = batch_size - len(batch["tokens"])  # rows of weight 0: few prompts are judged too
            batch = {name: np.pad(x, [(0, missing), (0, 0)]) for name, x in batch.items()}
            yield batch if rows is None else {name: x[rows] for name, x in batch.items()}

    def _held_out(self, batch_size: int, max_batches: int) -> list[Prompt]:
        return self.task.held_out(batch_size * (max_batches or HELD_OUT_BATCHES))

    def begin_phase(self, number: int, engine: Any) -> None:
        """Answers need nothing from the model."""


class AnswerBatches:
    """Batches by number."""

    def __init__(self, data: AnswerData, batch_size: int, rows: np.ndarray | None) -> None:
        self._data, self._rows, self._next = data, np.arange(batch_size) if rows is None else rows, 0
        self._batch_size = batch_size

    def __next__(self) -> Batch:
        first, self._next = self._next * self._batch_size, self._next + 1
        seed = self._data.config.seed
        return self._data.rows([self._data.task.train(seed, first + int(row)) for row in self._rows])

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = int(state["next_index"])
