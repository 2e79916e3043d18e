"""What reinforcement learning and learning from preferences come to on tasks with a known answer.

    python -m benchmarks.rl                                    # all but those of SmolLM2, an hour on two idle cores
    python -m benchmarks.rl --only smollm2-reward,smollm2-dpo  # after `make pretrained`: 600 to 800 processor s each
    python -m benchmarks.rl --only reverse-grpo --seeds 0      # one figure of one seed
    python -m benchmarks.rl --only cost,trl                    # what a step costs, beside TRL's GRPOTrainer

Every training is the command `jaxlm train CONFIG seed=SEED` in a process of its own; its minutes, its processor seconds
and its updates are all of that command: starting, compiling, validating and saving too. Then 1,000 prompts that no
training shows are answered, by the likeliest tokens and by one sample each, with intervals (Wilson 1927, 95 %).

A figure is kept in the folder of the runs beside its options and is not measured again, so an interrupted command goes
on with the next one; with other options it is refused. After `--minutes` no further figure is begun. A training that
was interrupted begins anew. After each figure `results/` is written: figures of other commands stay there.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import jaxlm
from benchmarks import peers, rl_step
from benchmarks.asked import listed, minutes, seeds
from benchmarks.kept import Kept
from benchmarks.sst2 import wilson
from jaxlm.infer.trained_run import Run

PROMPTS = 1000
CURVE = ("reward", "held_out_reward", "entropy", "length")
NOT_CACHED = "preference.cached_reference=false"
LOSSES = ("dpo", "ipo", "simpo", "orpo", "kto")
OF_LOSS = {
    "ipo": ("preference.beta=0.5",),
    "simpo": (NOT_CACHED, "preference.beta=2.0"),
    "orpo": (NOT_CACHED, "preference.odds_weight=30.0", "train.learning_rate=1e-3"),
    "kto": (NOT_CACHED, "train.learning_rate=1e-3"),
}
"""Options of each loss beside a config for `dpo`."""
SIDES = ("accuracy", "margin", "chosen_logp", "rejected_logp", "chosen_length", "rejected_length")


class Experiment(NamedTuple):
    """A config, the config of its start (empty: the config names a start that is there), and what it changes."""

    start: str
    config: str
    overrides: tuple[str, ...] = ()


SHARED = "rl.value_trunk=shared"
ROOM = ('rl.rewards=["exact_text", "overlong(longest=6, buffer=1)"]', "rl.max_new_tokens=6", "data.seq_len=12")
"""A sample that is cut loses 1, as in `ppo-add`: the value of its last state is never trained."""
EXPERIMENTS = {
    "reverse-grpo": Experiment("rl/answers-reverse", "rl/grpo-reverse"),
    "reverse-rloo": Experiment("rl/answers-reverse", "rl/grpo-reverse", ("rl.advantage=rloo",)),
    "reverse-ppo": Experiment("rl/answers-reverse", "rl/ppo-reverse"),
    "add-grpo": Experiment("rl/answers-add", "rl/grpo-add"),
    "add-ppo": Experiment("rl/answers-add", "rl/ppo-add", ("rl.value_trunk=own", "train.steps=900")),
    "reverse-ppo-shared": Experiment("rl/answers-reverse", "rl/ppo-reverse", (SHARED, *ROOM)),
    "add-ppo-shared": Experiment("rl/answers-add", "rl/ppo-add"),
}
UPDATES = {("rl/answers-add", 1): 380, ("rl/answers-add", 2): 840}
"""Of a start that reaches 40 to 50 % greedy before or after the target of its config, which is set for seed 0."""
POLITE = {
    "polite-reward": Experiment("preference/start", "preference/reward"),
    **{
        f"polite-{loss}": Experiment("preference/start", "preference/dpo", (f'preference.loss="{loss}"',))
        for loss in LOSSES
    },
}
SMOLLM2 = {
    "smollm2-reward": Experiment("", "preference/smollm2-reward"),
    "smollm2-dpo": Experiment("", "preference/smollm2-dpo"),
    **{
        f"smollm2-{loss}": Experiment("", "preference/smollm2-dpo", (f'preference.loss="{loss}"', *options))
        for loss, options in OF_LOSS.items()
    },
    "hh-reward": Experiment("", "preference/hh-reward"),
}
"""SmolLM2-135M-Instruct with adapters: `make pretrained` first. 600 to 800 processor seconds each, HH more."""
PREFERRED = POLITE | SMOLLM2
ONE_SEED = (*rl_step.FIGURES, *SMOLLM2)
UNAIDED = (*EXPERIMENTS, *POLITE, *rl_step.FIGURES)
"""Figures that need no pretrained model."""
FIGURES = (*UNAIDED, *SMOLLM2)


def share(right: int, of: int) -> dict[str, Any]:
    """How many are right, of how many, and the interval."""
    return {"right": right, "of": of, "accuracy": right / of, "interval": list(wilson(right, of))}


def train(config: str, run: Path, *overrides: str) -> dict[str, Any]:
    """Train a config from the beginning: its updates, the seconds of the whole command and of the processors."""
    shutil.rmtree(run, ignore_errors=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "jaxlm", "train", f"configs/{config}.toml", f'out_dir="{run}"', *overrides]
    subprocess.run(command, check=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"updates": Run(run).metrics[-1]["step"], "seconds": seconds, "cpu_seconds": cpu_seconds}


def answered(run: Path, task: str, temperature: float) -> dict[str, Any]:
    """How many held-out prompts of a task are answered rightly, by the likeliest tokens and by a sample of each.

    Args:
        temperature: of the rollouts, at which each is sampled once more: this is the policy that was trained.
    """
    from jaxlm.data.prompts import open_task
    from jaxlm.recipes.rollouts.jax_actor import JaxActor
    from jaxlm.text.completion import encode_prompts

    model = jaxlm.load(run)
    tokenizer: Any = model.tokenizer
    end, length = tokenizer.special("eot"), model.config.rl.max_new_tokens
    prompts = open_task(task).held_out(PROMPTS)
    actor = JaxActor(model.decoder, model.params, None, model.config, eos_id=end, pad=tokenizer.pad)
    ids = encode_prompts(tokenizer, [prompt.text for prompt in prompts])
    found = {}
    for name, hot in (("greedy", 0.0), ("sampled", 1.0), ("as trained", temperature)):
        drawn = actor.draw(ids, temperature=hot, max_new_tokens=length, seed=1)
        right = [[*tokenizer.encode(p.answer), end] == one for p, one in zip(prompts, drawn, strict=True)]
        found[name] = share(sum(right), len(right))
    return found


def curve(run: Path) -> list[list[float]]:
    """Step, and the means of `CURVE` at it."""
    rows = [row for row in Run(run).metrics if "reward" in row]
    return [[row["step"], *(round(row[name], 4) for name in CURVE)] for row in rows]


class Benchmark:
    """The figures of a folder of runs, and the options that each of them changes."""

    def __init__(self, runs: Path, extra: Sequence[str]) -> None:
        self.runs, self.extra, self.kept = runs, tuple(extra), Kept(runs / "figures.json")

    def keep(self, name: str, figure: Callable[[], dict[str, Any]], overrides: Sequence[str] = ()) -> dict[str, Any]:
        """The figure of this name: measured and written, if it is not there."""
        load = lambda: {"load": psutil.getloadavg()[0]}  # noqa: E731
        return self.kept.measured(name, {"overrides": list(overrides)}, lambda: figure() | load())

    def start(self, config: str, seed: int) -> Path:
        """The run of a config of a start and this seed, trained if it is not there."""
        run = self.runs / f"{Path(config).name}-{seed}"
        if not (run / "config.toml").is_file():
            self.kept.remove(f"{config}/{seed}")
        options = [f"train.steps={UPDATES[config, seed]}"] if (config, seed) in UPDATES else []
        self.keep(f"{config}/{seed}", lambda: train(config, run, f"seed={seed}", *options))
        return run

    def rewarded(self, name: str, seed: int) -> dict[str, Any]:
        """A run of reinforcement learning, and the answers before and after it."""
        experiment, run = EXPERIMENTS[name], self.runs / f"{name}-{seed}"
        start = self.start(experiment.start, seed)
        overrides = [*experiment.overrides, *self.extra]
        options = (*overrides, f"seed={seed}", f'train.init_from="{start}"')

        def measure() -> dict[str, Any]:
            cost = train(experiment.config, run, *options)
            rl = Run(run).config.rl
            before, after = (answered(one, rl.task, rl.temperature) for one in (start, run))
            found = {"before": before, **after, **cost, "curve": curve(run)}
            return found | {"overrides": overrides}

        return self.keep(f"{name}/{seed}", measure, overrides)

    def preferred(self, name: str, seed: int) -> dict[str, Any]:
        """A run on pairs, judged on those that are held out."""
        experiment, run = PREFERRED[name], self.runs / f"{name}-{seed}"
        overrides = [*experiment.overrides, *self.extra]
        options = (*overrides, f"seed={seed}")
        if experiment.start:
            options = (*options, f'train.init_from="{self.start(experiment.start, seed)}"')

        def measure() -> dict[str, Any]:
            cost = train(experiment.config, run, *options)
            rows = [row for row in Run(run).metrics if "validation_accuracy" in row]
            pairs = held_out_pairs(run)
            last = {key.removeprefix("validation_"): value for key, value in rows[-1].items()}
            chosen = {key: last[key] for key in SIDES if key in last}
            accuracies = [[row["step"], row["validation_accuracy"]] for row in rows]
            judged = pairs["pairs"] - int(last.get("unscored", 0))
            found = share(round(last["accuracy"] * judged), judged)
            found |= {"longer": last.get("longer", pairs["longer"]), "curve": accuracies, "overrides": overrides}
            return {**chosen, **cost, **found}

        return self.keep(f"{name}/{seed}", measure, overrides)


def held_out_pairs(run: Path) -> dict[str, Any]:
    """How many pairs a run holds out, and in how many the longer answer was chosen; half of a draw counts."""
    import numpy as np

    from jaxlm.data.preferences.source import PreferenceSource
    from jaxlm.text.tokenizer import Tokenizer

    source = PreferenceSource.open(Run(run).config, Tokenizer.from_file(run / "tokenizer.json"))
    lengths = np.diff(source.validation[-1].examples.offsets).reshape(-1, 2)
    longer = 0.5 * (1 + np.sign(lengths[:, 0] - lengths[:, 1]))
    return {"pairs": len(lengths), "longer": float(longer.mean())}


def line(name: str, figure: dict[str, Any]) -> str:
    """One line for the terminal."""
    parts = [name]
    sides = [("before ", figure["before"]), ("", figure)] if "before" in figure else []
    for when, side in sides:
        parts += [f"{when}{kind} {shown(side[kind])}" for kind in ("greedy", "sampled", "as trained") if kind in side]
    if "accuracy" in figure:
        parts.append(f"accuracy {shown(figure)}")
    if "updates" in figure:
        cost = f"{figure['seconds']:.0f} s, {figure['cpu_seconds']:.0f} processor s"
        parts.append(f"{figure['updates']} updates, {cost}, load {figure['load']:.1f}")
    return "; ".join(parts) if len(parts) > 1 else f"{name} {json.dumps(figure)}"


def shown(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{one['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {one['of']}"


def main() -> None:
    """Measure what is missing, and print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=listed(FIGURES), default=[*UNAIDED], help="which figures")
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="options of the config, such as train.steps=80")
    parser.add_argument("--runs", type=Path, default=Path("runs/rl"))
    parser.add_argument("--minutes", type=minutes, default=120.0)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/rl.json")
    options = parser.parse_args()
    benchmark, began = Benchmark(options.runs, options.set), time.perf_counter()
    for name in options.only:
        for seed in options.seeds[:1] if name in ONE_SEED else options.seeds:
            if time.perf_counter() - began > 60 * options.minutes:
                print(f"{name}: not begun, {options.minutes:g} minutes are over; the same command goes on", flush=True)
                continue
            if name in EXPERIMENTS:
                figure = benchmark.rewarded(name, seed)
            elif name in PREFERRED:
                figure = benchmark.preferred(name, seed)
            else:
                start = benchmark.start("rl/answers-reverse", 0)
                figure = benchmark.keep(name, lambda name=name, start=start: rl_step.FIGURES[name](start))
            print(line(f"{name}, seed {seed}", figure), flush=True)
            peers.save_figures("rl", benchmark.kept.figures, options.out)


if __name__ == "__main__":
    main()
