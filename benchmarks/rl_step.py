"""A step of GRPO: its cost beside its parts, how many programs a run compiles, TRL beside it, and reward hacking.

`hacking` says after how many steps a run that is paid for length says so.

`python -m benchmarks.rl --only cost,programs,trl,hacking` runs it. All begin with the model of
configs/rl/answers-reverse.toml and take the options of configs/rl/grpo-reverse.toml: 32 prompts, 8 samples of each, one
update.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.peers import Child, Peer
from jaxlm.report.page import inline
from jaxlm.report.plots import measures_of
from jaxlm.run.metrics import read_metrics

CONFIG = "configs/rl/grpo-reverse.toml"
ROUNDS = 20
PEERS = (Peer("jaxlm"), Peer("TRL"), Peer("TRL, best", best=True))
MAIN = ("_complete", "traced")
"""The programs of a phase: samples, update. Each also has one that judges: greedy answers, and validation."""
LONGER = ('rl.rewards=["length(per_token=0.1)"]', "rl.max_new_tokens=32", "data.seq_len=40", "train.steps=40")
"""A planted reward, longer is better, and room for it."""
MEASURED = ("length", "length_correlation", "ended", "reward")
MIXED = ('rl.task="bracket_matching(length=12)"', "data.seq_len=96", "rl.max_new_tokens=16", "rl.prompts=4")
"""Prompts of 13 to 60 characters, four a phase, so that the longest of a phase is now short and now long."""


class Stage:
    """The engine and the data of a run of GRPO, as `jaxlm train` makes them."""

    def __init__(self, start: Path, folder: Path, *overrides: str) -> None:
        from jaxlm.config import toml
        from jaxlm.processes.freed_memory import keep_freed_memory, one_step_at_a_time
        from jaxlm.recipes import make_recipe
        from jaxlm.recipes import start as runs
        from jaxlm.train.engine import JaxEngine

        keep_freed_memory()
        one_step_at_a_time()
        options = [f'train.init_from="{start}"', f'out_dir="{folder}"', *overrides]
        cfg = runs.with_base(toml.load(CONFIG, options))
        self.config, recipe, self.data = runs.open_stage(cfg, make_recipe(cfg), resume=False, tell=lambda _: None)
        self.engine = JaxEngine(self.config, recipe, runs.completer(self.config, self.data.tokenizer))
        runs.give_parameters(self.config, recipe, self.data, self.engine, False)
        self.batches, self.phase = self.data.batches(batch_size=256, rows=self.engine.rows), 0

    def step(self) -> int:
        """One phase, with what is due in it; returns how many tokens were drawn."""
        import jax

        self.data.begin_phase(self.phase, self.engine)
        jax.block_until_ready(self.engine.step(next(self.batches)))
        self.phase += 1
        return sum(len(sample.ids) for sample in self.data.phase.samples)

    def draw(self) -> None:
        """The samples of the last phase once more, and nothing else."""
        rl = self.config.rl
        prompts = [sample.prompt_ids for sample in self.data.phase.samples[:: rl.group]]
        options = {"temperature": rl.temperature, "max_new_tokens": rl.max_new_tokens, "seed": self.phase}
        self.data.actor(self.engine).sample(prompts, samples=rl.group, **options)

    def update(self) -> None:
        """The update of the last phase once more, and nothing else."""
        import jax

        jax.block_until_ready(self.engine.step(self.data.phase.batches[0]))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - cpu


def cost(start: Path) -> dict[str, Any]:
    """A whole step against its rollouts and its update apart, in turns; the rate is too small to change the policy."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(start, Path(folder) / "run", "train.learning_rate=1e-12")
        works = {"step": stage.step, "rollouts": stage.draw, "update": stage.update}
        for work in [*works.values()] * 2:
            work()
        times = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, work in works.items():
                times[name].append(timed(work))
    found: dict[str, Any] = {}
    for place, unit in enumerate(("s", "cpu_s")):
        means = {name: statistics.fmean(pair[place] for pair in pairs) for name, pairs in times.items()}
        medians = {name: statistics.median(pair[place] for pair in pairs) for name, pairs in times.items()}
        found |= {f"median_{unit}": medians, f"mean_{unit}": means}
        for kind, of in (("median", medians), ("mean", means)):
            found[f"ratio_of_{kind}_{unit}"] = of["step"] / (of["rollouts"] + of["update"])
    return found


def programs(start: Path) -> dict[str, Any]:
    """What 45 updates compile, by JAX's own log, with prompts of one length and of many."""
    found = {}
    mixed = (*MIXED, "rl.group=8", "train.batch_size=32", 'train.init_from=""', 'tokenizer.kind="bytes"')
    for name, overrides in (("one length", (f'train.init_from="{start}"',)), ("many lengths", mixed)):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "jaxlm", "train", CONFIG, f'out_dir="{folder}/run"', "train.steps=45"]
            log = Path(folder) / "log"
            with log.open("w") as file:
                environment = os.environ | {"JAX_LOG_COMPILES": "1"}
                subprocess.run([*command, *overrides], check=True, env=environment, stdout=file, stderr=file)
            compiled = re.findall(r"Compiling jit\((\w+)\)", log.read_text(encoding="utf-8"))
        counts = collections.Counter(compiled)
        found[name] = {"main": {key: counts[key] for key in MAIN}, "all": dict(counts.most_common())}
    return found


def hacking(start: Path) -> dict[str, Any]:
    """A reward that grows with the length: at which update a line says so, and whether the page shows it."""
    return {f"seed {seed}": watched(start, seed) for seed in range(3)}


def watched(start: Path, seed: int) -> dict[str, Any]:
    """One run of GRPO that is paid for length, and the line about its lengths, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = (f'out_dir="{run}"', f'train.init_from="{start}"', f"seed={seed}", *LONGER)
        command = [sys.executable, "-m", "jaxlm", "train", CONFIG, *options]
        done = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        alert = re.search(r"step (\d+): samples have grown from .*", done.stderr)
        rows = [row for row in read_metrics(run / "metrics.jsonl") if "length" in row]
        page, plot = (run / "report.html").read_text(encoding="utf-8"), inline(run / "plots" / "measures.png")
    return {
        "alert_step": int(alert[1]) if alert else None,
        "alert": alert[0] if alert else "",
        "curve": [[row["step"], *(round(row[name], 3) for name in MEASURED)] for row in rows],
        "plotted": bool(plot) and plot in page and {"length", "ended", "reward"} <= {*measures_of(rows)},
    }


def trl_work(start: Path, folder: Path) -> Callable[[], int]:
    """TRL's trainer with the same model, prompts and options; each call lets it make one step."""
    import datasets
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    import jaxlm
    from jaxlm.config import toml
    from jaxlm.data.prompts import open_task

    torch.set_num_threads(peers.threads())
    jaxlm.convert(start, folder / "llama", to="llama")
    task, rl = open_task("reverse(length=4)"), toml.load(CONFIG).rl
    prompts = [task.train(0, number) for number in range(4096)]
    ours = jaxlm.load(start)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llama")
    assert ours.tokenizer is not None
    assert tokenizer(prompts[0].text)["input_ids"] == ours.encode(prompts[0].text), "the same prompts"
    assert tokenizer.eos_token_id == ours.tokenizer.eot

    def exact(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [float(given.strip() == wanted) for given, wanted in zip(completions, answer, strict=True)]

    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            done.release()
            go.acquire()

    arguments = GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=rl.prompts * rl.group,
        num_generations=rl.group,
        max_completion_length=rl.max_new_tokens,
        max_steps=1_000_000,
        learning_rate=1e-12,
        lr_scheduler_type="constant",
        epsilon_high=rl.clip_high,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1_000_000,
        disable_tqdm=True,
    )
    rows = datasets.Dataset.from_list([{"prompt": p.text, "answer": p.answer} for p in prompts])
    trainer = GRPOTrainer(
        model=str(folder / "llama"),
        reward_funcs=exact,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    threading.Thread(target=trainer.train, daemon=True).start()
    done.acquire()

    def step() -> int:
        go.release()
        done.acquire()
        return round(trainer._metrics["train"]["completions/mean_length"][-1] * rl.prompts * rl.group)

    return step


def serve(name: str, start: Path) -> None:
    """The side of a peer: one step for each line, with its seconds and tokens."""
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        step = Stage(start, at / "run", "train.learning_rate=1e-12").step if name == "jaxlm" else trl_work(start, at)
        for _ in range(3):
            step()
        print(json.dumps({}), flush=True)
        for _ in sys.stdin:
            began, cpu = time.perf_counter(), time.process_time()
            tokens = step()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
            print(json.dumps({"s": seconds, "cpu_s": cpu_seconds, "tokens": tokens}), flush=True)
        sys.stdout.flush()
        os._exit(0)  # the trainer's thread waits for a turn that does not come


def trl(start: Path) -> dict[str, Any]:
    """Steps of jaxlm and of TRL in turns: tokens sampled and trained a second."""
    with tempfile.TemporaryDirectory() as folder:
        best = peers.best_environment(Path(folder))
        children: dict[str, Child] = {}
        try:
            for peer in PEERS:
                children[peer.name] = Child("benchmarks.rl_step", peer, ["--start", str(start)], best)
            answers = {name: [] for name in children}
            for _ in range(ROUNDS):
                for name, child in children.items():
                    answers[name].append(child.round())
        finally:
            for child in children.values():
                child.close()
    return compared({name: rate(rows) for name, rows in answers.items()})


def rate(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Tokens a second of the median step, by the clock and by processor time."""
    tokens = statistics.fmean(row["tokens"] for row in rows)
    seconds, cpu_seconds = (statistics.median(row[unit] for row in rows) for unit in ("s", "cpu_s"))
    spread = {"min_s": min(row["s"] for row in rows), "max_s": max(row["s"] for row in rows)}
    rates = {"tokens_per_s": tokens / seconds, "tokens_per_cpu_s": tokens / cpu_seconds}
    return {"tokens": tokens, "median_s": seconds, "cpu_s": cpu_seconds, **spread, **rates}


def compared(found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The peers, and jaxlm's tokens a second as a multiple of the faster of the others."""
    others = [one for name, one in found.items() if name != "jaxlm"]
    ratios = {
        f"ratio_{unit}": found["jaxlm"][unit] / max(one[unit] for one in others)
        for unit in ("tokens_per_s", "tokens_per_cpu_s")
    }
    return {"peers": found, **ratios}


FIGURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cost": cost,
    "programs": programs,
    "trl": trl,
    "hacking": hacking,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", required=True)
    parser.add_argument("--start", type=Path, required=True)
    given = parser.parse_args()
    serve(given.child, given.start)
