"""How much of a gradient of GRPO is direction and how much is chance: prompts against samples of each, temperature.

    python -m benchmarks.rl_gradients runs/answers-add            # three minutes of one core

The policy does not move. For each way to spend 1,024 samples a few phases are drawn. The gradient of each is compared
(cosine) with those of the others, and with the gradient of the right answers to 6,144 prompts, which is known to lead
to them. With a cosine of c between two phases, c / (1 - c) is the power of the direction over that of chance.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import jaxlm
from benchmarks import peers
from benchmarks.asked import positive
from benchmarks.kept import Kept
from jaxlm.config import toml
from jaxlm.recipes import grpo
from jaxlm.recipes.rollouts.jax_actor import JaxActor
from jaxlm.recipes.rollouts.phases import Batch, Drawn, lay
from jaxlm.recipes.rollouts.source import RolloutData
from jaxlm.train.recipe import MODEL

CASES = ((64, 16, 1.0), (64, 16, 0.7), (128, 8, 0.7), (256, 4, 1.0), (256, 4, 0.7), (512, 2, 0.7))
"""Prompts, samples of each, temperature."""
TAUGHT, TEACHINGS = 1024, 6


class Gradients:
    """Gradients of batches for the parameters of a start, as vectors of length 1."""

    def __init__(self, start: Path) -> None:
        self.model, self.start = jaxlm.load(start), start

    def data(self, *overrides: str) -> RolloutData:
        """The rollouts of `configs/rl/grpo-add.toml` with other options."""
        options = [f'train.init_from="{self.start}"', "rl.keep_every=0", "rl.advantage=group", *overrides]
        cfg = toml.load("configs/rl/grpo-add.toml", options)
        return RolloutData(cfg, self.model.tokenizer, grpo.STAGE)

    def of(self, data: RolloutData) -> Callable[[Batch], np.ndarray]:
        """The gradient of a batch by the objective of these options."""
        objective = grpo.objective({MODEL: self.model.decoder}, data.config)

        def loss(params: Any, batch: Batch) -> Any:
            total, sums = objective(params, {}, batch, None)
            return total / sums["weight"]

        compute = jax.jit(jax.grad(loss))

        def gradient(batch: Batch) -> np.ndarray:
            arrays = {name: x for name, x in batch.items() if np.ndim(x)}
            vector = np.asarray(ravel_pytree(compute(self.model.params, arrays))[0], np.float64)
            return vector / np.linalg.norm(vector)

        return gradient

    def taught(self) -> np.ndarray:
        """The gradient of the right answers."""
        data = self.data(f"rl.prompts={TAUGHT}", "rl.group=2", f"train.batch_size={2 * TAUGHT}", "rl.temperature=1.0")
        asking, gradient = data.phases.asking, self.of(data)
        total = np.zeros(())
        for seed in range(TEACHINGS):
            prompts = [data.task.train(100 + seed, number) for number in range(TAUGHT)]
            ids = asking.encode([prompt.text for prompt in prompts])
            answers = [asking.answer(prompt.answer) for prompt in prompts]
            drawn = [Drawn(*one, "end", "") for one in zip(prompts, ids, answers, strict=True)]
            batch = lay(drawn, data.config.data.seq_len, data.tokenizer.pad)
            batch |= {"advantages": batch["weights"].copy(), "sampler_logps": np.zeros_like(batch["weights"])}
            total = total + gradient(batch)
        return total / np.linalg.norm(total)

    def case(self, prompts: int, group: int, temperature: float, phases: int, right: np.ndarray) -> dict[str, Any]:
        """Cosines of the gradients of several phases."""
        sizes = (f"rl.prompts={prompts}", f"rl.group={group}", f"train.batch_size={prompts * group}")
        data = self.data(*sizes, f"rl.temperature={temperature}")
        ends: dict[str, int] = {"eos_id": data.phases.asking.end, "pad": data.tokenizer.pad}
        actor = JaxActor(self.model.decoder, self.model.params, None, data.config, **ends)
        gradient, drawn = self.of(data), [data.phases.run(actor, 1000 + number) for number in range(phases)]
        vectors = [gradient(phase.batches[0]) for phase in drawn]
        among = [float(one @ other) for one, other in itertools.combinations(vectors, 2)]
        with_right = [float(vector @ right) for vector in vectors]
        return {
            "among phases": float(np.mean(among)),
            "with right answers": float(np.mean(with_right)),
            "standard error": float(np.std(with_right, ddof=1) / phases**0.5),
            "reward": float(np.mean([phase.metrics["reward"] for phase in drawn])),
            "informative groups": float(np.mean([phase.metrics["informative_groups"] for phase in drawn])),
        }


def main() -> None:
    """Measure what is missing, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", type=Path, help="a run of configs/rl/answers-add.toml")
    parser.add_argument("--phases", type=positive, default=4)
    parser.add_argument("--kept", type=Path, default=Path("runs/rl-gradients.json"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/rl_gradients.json")
    options = parser.parse_args()
    gradients, kept = Gradients(options.start), Kept(options.kept)
    config = hashlib.sha256(Path("configs/rl/grpo-add.toml").read_bytes()).hexdigest()
    own = {"phases": options.phases, "start": str(options.start), "config": config}
    right = gradients.taught()
    for prompts, group, temperature in CASES:
        name = f"{prompts} x {group}, temperature {temperature:g}"
        make = lambda case=(prompts, group, temperature): gradients.case(*case, options.phases, right)  # noqa: E731
        found = kept.measured(name, own, make)
        print(name, {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}, flush=True)
    peers.save_figures("rl_gradients", kept.figures, options.out)


if __name__ == "__main__":
    main()
