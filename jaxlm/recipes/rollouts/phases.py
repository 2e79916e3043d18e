"""A phase of reinforcement learning: prompts, samples of the policy, their rewards and advantages, and the batches.

    phases = Phases(cfg, task, tokenizer, pool)
    phase = phases.run(actor, number=17)        # a function of (seed, number) and of the policy as it stands
    for batch in phase.batches: step(batch)

A sample is ids from first to last: what was drawn is what is trained on, never text that is encoded again. It imports
neither jax nor torch; an `Actor` is the policy in one of them.

Shapes: B samples, T tokens of a row, G prompts, N samples of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jaxlm import config
from jaxlm.data.prompts import Prompt, Task
from jaxlm.errors import UserError
from jaxlm.recipes.rollouts.asking import Asking
from jaxlm.recipes.rollouts.graders import GraderPool, Sample
from jaxlm.text.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


@runtime_checkable
class Actor(Protocol):
    """The policy as it stands, in one framework."""

    def draw(
        self, prompts: Sequence[Sequence[int]], *, temperature: float, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """New ids of each prompt, up to `max_new_tokens`; the numbers of row r are those of (seed, r)."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], *, samples: int, temperature: float, max_new_tokens: int, seed: int
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """As `draw`, above temperature 0, and the log-probability of each new id as the program that drew it has it.

        Args:
            samples: of each prompt, side by side: each is a row with numbers of its own.
        """
        ...

    def logps(self, batch: Mapping[str, np.ndarray], *, reference: bool) -> np.ndarray:
        """Log-probability [B, T] of every target, under the policy or under where it started."""
        ...

    def adapted_kl_weight(self, weight: float, kl: float, samples: int) -> float:
        """`objectives.advantages.adapt_kl_weight` of this framework, as the config has it."""
        ...

    def advantages(self, rewards_GN: np.ndarray, valid_GN: np.ndarray) -> np.ndarray:
        """`objectives.advantages.advantages` of this framework, as the config has it."""
        ...


class Drawn(NamedTuple):
    """One sample."""

    prompt: Prompt
    prompt_ids: list[int]
    ids: list[int]
    """What was drawn: up to the first of the end ids, with it."""
    ended: str
    """`end`, or `length`."""
    text: str
    logps: np.ndarray | None = None
    """Of `ids` under the program that drew them; None: nobody drew them."""
    grades: tuple[float | None, ...] = ()
    reward: float | None = None


class Phase(NamedTuple):
    """What the samples of one phase came to."""

    samples: list[Drawn]
    advantages: np.ndarray
    """Of each token [B, T]."""
    batches: list[Batch]
    metrics: dict[str, float]


class Phases:
    """Makes the phases of a run."""

    def __init__(self, cfg: config.Config, task: Task, tokenizer: Tokenizer, pool: GraderPool) -> None:
        self.config, self.rl, self.task, self.tokenizer, self.pool = cfg, cfg.rl, task, tokenizer, pool
        self.asking = Asking.of(cfg, tokenizer)
        self.ends = self.asking.ends
        self.kl_weight = cfg.rl.kl_weight
        """Of the divergence in the rewards of the next phase; part of what a checkpoint keeps if it has a target."""

    def run(self, actor: Actor, number: int) -> Phase:
        """Phase `number`.

        Raises:
            UserError: a prompt does not fit into a row, too many grades are missing, or no refill helps.
        """
        rl = self.rl
        samples = self._collect(actor, number)
        batch = lay(samples, self.config.data.seq_len, self.tokenizer.pad, keep_cut=rl.cut == "keep")
        batch["sampler_logps"] = sampler_logps(samples, self.config.data.seq_len)
        if "old_logps" in rl.columns:
            batch["old_logps"] = actor.logps(batch, reference=False)
        if "reference_logps" in rl.columns:
            batch["reference_logps"] = actor.logps(batch, reference=True)
        valid_B = np.array([sample.reward is not None for sample in samples])
        batch["weights"] = np.where(valid_B[:, None], batch["weights"], 0)
        batch |= self.credit(actor, batch, samples)
        metrics = self._metrics(samples) | self.measured(batch)
        if "old_logps" in rl.columns:
            apart_BT = np.abs(batch["old_logps"] - batch["sampler_logps"])
            metrics["mismatch_max"] = float(np.where(batch["weights"] > 0, apart_BT, 0).max())
        if rl.kl == "reward":
            metrics |= self._moved(actor, batch)
        return Phase(samples, batch["advantages"], self._batches(batch, number), metrics)

    def _moved(self, actor: Actor, batch: Batch) -> dict[str, float]:
        """How far the samples are from the start, in nats each.

        With a target, the weight of the divergence moves for the next phase (Ziegler et al. 2019, section 2.2).
        """
        counted_B = batch["weights"].any(axis=1)  # samples without a grade teach nothing
        moved_BT = (batch["old_logps"] - batch["reference_logps"]) * batch["weights"]
        moved_B = moved_BT.sum(1)[counted_B]
        kl, used = float(moved_B.mean()) if len(moved_B) else 0.0, self.kl_weight
        if not self.rl.kl_target:
            return {"kl_start": kl}
        self.kl_weight = actor.adapted_kl_weight(used, kl, len(moved_B))
        return {"kl_start": kl, "kl_weight": used}

    def measured(self, batch: Batch) -> dict[str, float]:
        """More numbers of the phase, of all its rows together."""
        return {}

    def credit(self, actor: Actor, batch: Batch, samples: Sequence[Drawn]) -> Batch:
        """How much better than expected each token was: here, how its sample compares with others of its prompt."""
        rewards_B = np.array([np.nan if sample.reward is None else sample.reward for sample in samples], np.float64)
        rewards_GN = rewards_B.reshape(-1, self.rl.group)
        valid_GN = ~np.isnan(rewards_GN)
        if self.rl.kl == "reward":
            moved_BT = (batch["old_logps"] - batch["reference_logps"]) * batch["weights"]
            rewards_GN = rewards_GN - self.kl_weight * moved_BT.sum(1).reshape(rewards_GN.shape)
        advantages_B1 = actor.advantages(rewards_GN, valid_GN).reshape(-1, 1)
        return {"advantages": np.repeat(advantages_B1, batch["weights"].shape[1], axis=1)}

    def _collect(self, actor: Actor, number: int) -> list[Drawn]:
        """The samples of a phase. Groups whose rewards are all equal are replaced as often as `rl.refills` allows."""
        rl = self.rl
        differing: list[Drawn] = []
        equal: list[Drawn] = []
        for refill in range(rl.refills + 1):
            fresh = self._samples(actor, number, refill)
            for first in range(0, len(fresh), rl.group):
                group = fresh[first : first + rl.group]
                rewards = {sample.reward for sample in group if sample.reward is not None}
                (differing if len(rewards) > 1 else equal).extend(group)
            if not rl.refills:
                return fresh
            if len(differing) >= rl.prompts * rl.group:
                break
        if not differing:
            raise UserError(
                f"phase {number}: the samples of every prompt had equal rewards, and {rl.refills} refills did not help",
                "easier prompts, a reward with degrees, or a better start",
            )
        return (differing + equal)[: rl.prompts * rl.group]  # the shape is always the same

    def _samples(self, actor: Actor, number: int, refill: int) -> list[Drawn]:
        """Samples of the next prompts, with their grades."""
        rl = self.rl
        first = (number * (rl.refills + 1) + refill) * rl.prompts
        chosen = [self.task.train(self.config.seed, first + i) for i in range(rl.prompts)]
        encoded = self._encoded(chosen)
        repeated = [ids for ids in encoded for _ in range(rl.group)]
        seed = int(np.random.SeedSequence((self.config.seed, number, refill)).generate_state(1)[0])
        options = {"temperature": rl.temperature, "max_new_tokens": rl.max_new_tokens, "seed": seed}
        drawn = actor.sample(encoded, samples=rl.group, **options)
        samples = [
            self.cut(chosen[i // rl.group], prompt_ids, ids)._replace(logps=logps)
            for i, (prompt_ids, ids, logps) in enumerate(zip(repeated, *drawn, strict=True))
        ]
        return self.graded(samples)

    def _encoded(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of prompts.

        Raises:
            UserError: one does not fit into a row with a completion; the longest is named.
        """
        encoded = self.asking.encode([prompt.text for prompt in prompts])
        longest, width = max(map(len, encoded)), self.config.data.seq_len
        if longest + self.rl.max_new_tokens > width:
            text = next(one.text for one, ids in zip(prompts, encoded, strict=True) if len(ids) == longest)
            raise UserError(
                f"rl.task = {self.task.name!r}: the prompt {text[:40]!r} of {longest} tokens and rl.max_new_tokens = "
                f"{self.rl.max_new_tokens} do not fit into data.seq_len = {width}",
                f"data.seq_len={longest + self.rl.max_new_tokens}",
            )
        return encoded

    def check(self) -> None:
        """Find before anything is drawn what would end a run later.

        Raises:
            UserError: a prompt does not fit into a row, or a reward fails on right answers.
        """
        first = [self.task.train(self.config.seed, number) for number in range(self.rl.prompts)]
        self._encoded([*(self.task.kept or first), *self.task.held_out(self.rl.held_out)])
        few = [self.cut(prompt, [], self.asking.answer(prompt.answer)) for prompt in first[:2]]
        self.pool.try_rewards([Sample(one.prompt.text, one.text, _row(one)) for one in few])

    def cut(self, prompt: Prompt, prompt_ids: list[int], ids: list[int]) -> Drawn:
        """A sample up to the first end; its text is without the end."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(kept if end is None else kept[:-1])
        return Drawn(prompt, prompt_ids, kept, "length" if end is None else "end", text)

    def graded(self, samples: Sequence[Drawn]) -> list[Drawn]:
        """The samples with their grades and their reward: the weighted sum, or None if one grade is missing."""
        seen = [Sample(one.prompt.text, one.text, _row(one)) for one in samples]
        graded = []
        for sample, grades in zip(samples, self.pool.grade(seen), strict=True):
            values = tuple(grade.value for grade in grades)
            parts = [x * reward.weight for x, reward in zip(values, self.pool.rewards, strict=True) if x is not None]
            total = sum(parts) if len(parts) == len(values) else None
            graded.append(sample._replace(grades=values, reward=total))
        return graded

    def _batches(self, batch: Batch, number: int) -> list[Batch]:
        """The minibatches of every iteration: rows in an order of their own, by (seed, phase, iteration)."""
        rl, rows = self.rl, len(batch["tokens"])
        if rl.iterations * rl.minibatches == 1:
            return [batch]
        found = []
        for iteration in range(rl.iterations):
            order = np.random.default_rng((self.config.seed, number, iteration)).permutation(rows)
            found += [{k: x[part] for k, x in batch.items()} for part in np.array_split(order, rl.minibatches)]
        return found

    def _metrics(self, samples: Sequence[Drawn]) -> dict[str, float]:
        kept = [sample.reward for sample in samples if sample.reward is not None]
        groups = [samples[first : first + self.rl.group] for first in range(0, len(samples), self.rl.group)]
        differing = [len({one.reward for one in group if one.reward is not None}) > 1 for group in groups]
        return {
            "reward": float(np.mean(kept)),
            "reward_std": float(np.std(kept)),
            "informative_groups": float(np.mean(differing)),
            "ungraded": 1 - len(kept) / len(samples),
            "length": float(np.mean([len(sample.ids) for sample in samples])),
            "ended": float(np.mean([sample.ended == "end" for sample in samples])),
            "length_correlation": length_correlation(groups),
        }


def length_correlation(groups: Sequence[Sequence[Drawn]]) -> float:
    """Correlation of reward and length among samples of one prompt; 0 where either is the same in every group.

    Differences between prompts say nothing: a long answer may be right for one and wrong for another. A group of one
    has nothing to be compared with: then all samples are one group.
    """
    if all(len(group) == 1 for group in groups):
        groups = [[sample for group in groups for sample in group]]
    graded = [np.array([(one.reward, len(one.ids)) for one in g if one.reward is not None], float) for g in groups]
    apart = np.concatenate([pairs - pairs.mean(axis=0) for pairs in graded if len(pairs)])
    rewards, lengths = apart.T
    scale = np.sqrt((rewards**2).sum() * (lengths**2).sum())
    return float(rewards @ lengths / scale) if scale > 0 else 0.0


def sampler_logps(samples: Sequence[Drawn], seq_len: int) -> np.ndarray:
    """Log-probabilities [B, T] of the drawn tokens by the program that drew them, where `lay` has their weights."""
    wide = np.result_type(*{one.logps.dtype for one in samples if one.logps is not None})
    found = np.zeros((len(samples), seq_len), wide)
    for row, sample in enumerate(samples):
        if sample.logps is not None:
            first = len(sample.prompt_ids) - 1
            found[row, first : first + len(sample.ids)] = sample.logps[: len(sample.ids)]
    return found


def _row(sample: Drawn) -> dict[str, Any]:
    """What a reward knows besides the texts."""
    facts = {"answer": sample.prompt.answer, "tokens": len(sample.ids), "ended": sample.ended}
    return {**sample.prompt.row, **facts}


def lay(samples: Sequence[Drawn], seq_len: int, pad: int, *, keep_cut: bool = True) -> Batch:
    """Samples as rows: every token and its target, shifted once; weight 1 where the target was drawn.

    The last token stands in the row too, without a target: a value model judges the state after it. Padding is known by
    its segment, so a tokenizer whose padding is its end of text loses nothing.
    """
    shape = len(samples), seq_len
    batch = {
        "tokens": np.full(shape, pad, np.int32),
        "targets": np.full(shape, pad, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segments": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
    }
    for row, sample in enumerate(samples):
        ids, first = [*sample.prompt_ids, *sample.ids], len(sample.prompt_ids)
        batch["tokens"][row, : len(ids)], batch["targets"][row, : len(ids) - 1] = ids, ids[1:]
        batch["positions"][row, : len(ids)], batch["segments"][row, : len(ids)] = np.arange(len(ids)), 1
        if keep_cut or sample.ended == "end":
            batch["weights"][row, first - 1 : len(ids) - 1] = 1
    return batch
