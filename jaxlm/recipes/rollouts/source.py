"""Phases of reinforcement learning as the data of a recipe: what its updates need is made when a phase begins.

The number of a phase is all that a resumed run needs: prompts, random numbers and the order of rows follow from it, and
the samples from the policy in the checkpoint, which stands at the end of a phase.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm import config
from jaxlm.data.prompts import Prompt, open_task
from jaxlm.data.rows.validation import HeldOut
from jaxlm.data.stage_tokenizer import stage_tokenizer
from jaxlm.data.turns.inspect import rows_of_step
from jaxlm.errors import UserError
from jaxlm.recipes.rollouts.graders import GraderPool
from jaxlm.recipes.rollouts.inspect import PromptReport, report_of
from jaxlm.recipes.rollouts.phases import Actor, Batch, Drawn, Phase, Phases, lay
from jaxlm.recipes.rollouts.rewards import find_rewards
from jaxlm.run.rollouts import write_rollouts
from jaxlm.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

MEASURES = (
    *("reward", "reward_std", "informative_groups", "ungraded"),
    *("length", "length_correlation", "ended", "held_out_reward"),
)
"""Numbers of a phase that go along with each of its batches, and so into the metrics of every update."""


class Stage(NamedTuple):
    """What a recipe of reinforcement learning has of its own."""

    name: str
    """Of its module: `torch_ref.recipes.NAME` is the twin."""
    actor_of: Callable[..., Actor]
    """`(engine, cfg, eos_id=, pad=)`: the policy of the JAX engine; the twin has a function of this name."""
    phases: type[Phases] = Phases
    credit: tuple[str, ...] = ("advantages",)
    """What a phase knows of each token beside its log-probabilities."""
    measures: tuple[str, ...] = MEASURES


class RolloutData:
    """Prompts of `rl.task`, sampled and graded; see `train.recipe.DataSource`."""

    def __init__(self, cfg: config.Config, own: Tokenizer | None, stage: Stage) -> None:
        rl, self.stage = cfg.rl, stage
        self.measures = (*stage.measures, *rl.measures)
        self.config, self.tokenizer = cfg, stage_tokenizer(cfg, own)
        self.updates_per_phase = rl.iterations * rl.minibatches
        rows = rl.prompts * rl.group // rl.minibatches
        if cfg.train.batch_size != rows:
            raise UserError(
                f"train.batch_size = {cfg.train.batch_size} is not rl.prompts x rl.group / rl.minibatches = {rows}",
                f"train.batch_size={rows}",
            )
        self.task = open_task(rl.task)
        self.pool = GraderPool(find_rewards(rl.rewards), limit_s=rl.grader_seconds)
        self.phases = stage.phases(cfg, self.task, self.tokenizer, self.pool)
        self.phases.check()
        self.ends = sorted(self.phases.ends)
        self.phase: Phase | None = None
        self.held_out_reward = 0.0
        """Of the last greedy answers, given every `rl.evaluate_every` phases; part of what a checkpoint keeps."""

    def identity(self) -> dict[str, str]:
        return {
            "tokenizer": self.tokenizer.fingerprint(),
            "task": self.task.name,
            "rewards": " ".join(self.config.rl.rewards),
        }

    def inspect(self, *, step: int = 1, rows: int = 1) -> PromptReport:
        """The first prompts of the phase to which an update belongs, and the sizes of both parts.

        Raises:
            UserError: the step lies beyond the run.
        """
        cfg, rl = self.config, self.config.rl
        count = len(rows_of_step(cfg.train, step, min(rows, rl.prompts)))
        first = (step - 1) // self.updates_per_phase * (rl.refills + 1) * rl.prompts
        return report_of(cfg, self.task, self.phases.asking, range(first, first + count))

    def batches(self, *, batch_size: int, rows: np.ndarray | None) -> RolloutBatches:
        if rows is not None and len(rows) != batch_size:
            raise UserError("reinforcement learning runs in one process", "its devices may be many: see [mesh]")
        return RolloutBatches(self)

    def begin_phase(self, number: int, engine: Any) -> None:
        actor = self.actor(engine)
        self.phase = self.phases.run(actor, number)
        if number % self.config.rl.evaluate_every == 0:
            self.held_out_reward = self.greedy_reward(actor, self.config.rl.held_out)
        if self.config.rl.keep_every and number % self.config.rl.keep_every == 0:
            step = number * self.updates_per_phase + 1
            write_rollouts(Path(self.config.out_dir), step, self._kept(self.phase, actor))
        measured = self.phase.metrics | {"held_out_reward": self.held_out_reward}
        for batch in self.phase.batches:
            batch |= {name: np.asarray(measured[name], np.float32) for name in self.measures}

    def _kept(self, phase: Phase, actor: Actor) -> list[dict[str, Any]]:
        """The samples of a phase, each with the means over its tokens; see `run.rollouts.Rollouts`."""
        batch = lay(phase.samples, self.config.data.seq_len, self.tokenizer.pad)
        means: dict[str, Any] = {"advantage": phase.advantages, "logp": actor.logps(batch, reference=False)}
        if "reference_logps" in self.config.rl.columns:
            means["reference_logp"] = actor.logps(batch, reference=True)
        count_B = batch["weights"].sum(1).clip(min=1)
        means = {name: (x_BT * batch["weights"]).sum(1) / count_B for name, x_BT in means.items()}
        rewards = [reward.name for reward in self.pool.rewards]
        return [
            {
                "prompt": sample.prompt.text,
                "answer": sample.prompt.answer,
                "text": sample.text,
                "tokens": len(sample.ids),
                "ended": sample.ended,
                "grades": dict(zip(rewards, sample.grades, strict=True)),
                "reward": sample.reward,
                **{"reference_logp": None, **{name: float(mean_B[row]) for name, mean_B in means.items()}},
            }
            for row, sample in enumerate(phase.samples)
        ]

    def actor(self, engine: Any) -> Actor:
        """The policy of an engine, in its framework."""
        actor_of = self.stage.actor_of
        if type(engine).__module__.startswith("torch_ref"):
            actor_of = importlib.import_module(f"torch_ref.recipes.{self.stage.name}").actor_of
        return actor_of(engine, self.config, eos_id=self.phases.asking.end, pad=self.tokenizer.pad)

    def greedy_reward(self, actor: Actor, count: int) -> float:
        """Mean reward of the likeliest answers to the held-out prompts."""
        prompts = self.task.held_out(count)
        ids = self.phases.asking.encode([prompt.text for prompt in prompts])
        drawn = actor.draw(ids, temperature=0.0, max_new_tokens=self.config.rl.max_new_tokens, seed=0)
        graded = self.phases.graded([self.phases.cut(*one) for one in zip(prompts, ids, drawn, strict=True)])
        rewards = [sample.reward for sample in graded if sample.reward is not None]
        return float(np.mean(rewards)) if rewards else 0.0

    def held_out(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> list[HeldOut]:
        answers, longest = self._answers(self.task.held_out(self.config.rl.held_out)), self.config.rl.max_new_tokens
        if beyond := sum(len(answer) > longest for answer in answers):
            text = "warning: %d of %d held-out answers are longer than rl.max_new_tokens = %d and are not judged"
            _log.warning(text, beyond, len(answers), longest)
        batches = functools.partial(self.held_out_batches, batch_size=batch_size, rows=rows, max_batches=max_batches)
        return [HeldOut("", True, batches)]

    def _answers(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of the right answer to each prompt, with their end."""
        return [self.phases.asking.answer(prompt.answer) for prompt in prompts]

    def held_out_batches(self, *, batch_size: int, rows: np.ndarray | None, max_batches: int) -> Iterator[Batch]:
        """Held-out prompts with their answers, as rows: how likely the model finds what is right."""
        prompts = self.task.held_out(min(self.config.rl.held_out, batch_size * max_batches or self.config.rl.held_out))
        ids, answers = self.phases.asking.encode([prompt.text for prompt in prompts]), self._answers(prompts)
        samples = [
            Drawn(prompt, before, answer, "end", prompt.answer)
            for prompt, before, answer in zip(prompts, ids, answers, strict=True)
            if len(answer) <= self.config.rl.max_new_tokens
        ]
        for first in range(0, len(samples), batch_size):
            batch = lay(samples[first : first + batch_size], self.config.data.seq_len, self.tokenizer.pad)
            missing = batch_size - len(batch["tokens"])
            batch = {name: np.pad(x, [(0, missing), (0, 0)]) for name, x in batch.items()}
            names = (*self.stage.credit, *self.config.rl.columns)
            beside = {name: np.zeros_like(batch["weights"]) for name in names}
            yield batch | beside | {name: np.zeros((), np.float32) for name in self.measures}


class RolloutBatches:
    """The batches of the phase that has begun.

    The state is the number of the next batch, what the last greedy answers were worth, and a weight that moves.
    """

    def __init__(self, data: RolloutData) -> None:
        self._data, self._next = data, 0

    def __next__(self) -> Batch:
        phase = self._data.phase
        assert phase is not None, "the loop begins a phase before it asks for its batches"
        batch = phase.batches[self._next % self._data.updates_per_phase]
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        data, phases = self._data, self._data.phases
        state = {"next_index": self._next, "held_out_reward": data.held_out_reward}
        return state | ({"kl_weight": phases.kl_weight} if phases.rl.kl_target else {})

    def set_state(self, state: dict[str, Any]) -> None:
        self._next = int(state["next_index"])
        self._data.held_out_reward = float(state.get("held_out_reward", 0.0))
        self._data.phases.kl_weight = float(state.get("kl_weight", self._data.phases.kl_weight))
