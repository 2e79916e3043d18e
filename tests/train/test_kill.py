"""A training process that is killed again and again ends with the parameters of one that is not."""

import copy
import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.train.checkpoint import Checkpointer
from tests.waiting import HANGS

OPTIONS = ("checkpoint.every=1", "checkpoint.keep=2", "eval.every=20", "log.every=7")
SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]


POLICY = """
recipe = "{recipe}"
[model]
d_model = 16
n_layers = 2
n_heads = 2
n_kv_heads = 1
d_ff = 24
[tokenizer]
kind = "bytes"
[data]
seq_len = 12
[rl]
task = "reverse(length=2)"
rewards = ["even_letters:share"]
prompts = 4
group = 4
max_new_tokens = 6
iterations = 2
minibatches = 2
held_out = 4
evaluate_every = 5
keep_every = 5
[train]
steps = 240
batch_size = 8
learning_rate = 3e-3
[eval]
every = 40
batches = 1
[sample]
prompts = []
[checkpoint]
every = 1
keep = 2
[log]
every = 8
"""
EVEN_LETTERS = """
def share(prompt, completion, row):
    return sum(ord(letter) % 2 == 0 for letter in completion) / max(len(completion), 1)
"""
"""A reward of the user's own, which other processes judge."""


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sigkill_at_random_moments(runs, tmp_path, leaves, rows, seed):
    assert killed_again_and_again(runs, tmp_path, ("train.steps=60", *OPTIONS), 20, leaves, rows, seed) > 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_sigkill_at_random_moments_of_phases(runs, tmp_path, leaves, rows, seed, recipe):
    """Four updates a phase; what stands in a checkpoint is the end of one, from which the next is drawn again."""
    policies = copy.copy(runs)
    policies.toml = tmp_path / "policy.toml"
    policies.toml.write_text(POLICY.format(recipe=recipe))
    (tmp_path / "even_letters.py").write_text(EVEN_LETTERS)
    killed_again_and_again(policies, tmp_path, (), 5, leaves, rows, seed, cwd=tmp_path)


def killed_again_and_again(runs, folder, options, kills, leaves, rows, seed, **process_options) -> int:
    """Compare runs that are killed at random moments with one that is not; returns how many kills fell into a save."""
    quiet = {"stdout": None, "stderr": None, **process_options}
    begun = time.monotonic()
    assert runs.start(folder / "whole", *options, **quiet).wait() == 0
    whole_run = time.monotonic() - begun
    expected, metrics, kept = leaves(folder / "whole"), rows(folder / "whole"), samples(folder / "whole")

    chance, done, in_save, run = random.Random(seed), 0, 0, 0
    while done < kills or (folder / f"run{run}").exists() or not run:
        out = folder / f"run{run}"
        process = runs.start(out, *options, resume=True, **quiet)
        if done < kills:
            time.sleep(chance.uniform(0, whole_run))
            if process.poll() is None:
                process.kill()
                process.wait()
                done += 1
                in_save += any(out.glob("checkpoints/*.orbax-checkpoint-tmp*"))
                continue
        assert process.wait() == 0
        run += 1
        found = leaves(out)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name
        assert rows(out) == metrics and samples(out) == kept
        assert not (out / "damaged").exists()
    print(f"{done} kills, {in_save} of them during a save, {run} runs finished, one run takes {whole_run:.1f} s")
    return in_save


def samples(run: Path) -> dict[str, str]:
    """The samples that a run has kept."""
    return {file.name: file.read_text() for file in sorted((run / "rollouts").glob("*.jsonl"))}


def children(process) -> list[int]:
    """Of a process, in the order in which they were started."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()] if listed.exists() else []


def kill_one(process, out: Path, chance: random.Random, longest: float, in_save: bool) -> str:
    """Kill one of the launched processes at a random moment, or while a checkpoint is written; tells where it stood."""
    until = time.monotonic() + (longest if in_save else chance.uniform(0, longest))
    while time.monotonic() < until and process.poll() is None:
        if in_save and any(out.glob("checkpoints/*.orbax-checkpoint-tmp*")):
            break
        time.sleep(0.002)
    if not (alive := children(process)):
        return ""
    index = chance.randrange(len(alive))
    os.kill(alive[index], signal.SIGKILL)
    writing = [path.name.partition(".")[0] for path in out.glob("checkpoints/*.orbax-checkpoint-tmp*")]
    return f"process {index}{', in a save of step ' + writing[0] if writing else ''}"


def test_sigterm_to_one_process_saves_all_at_one_step(runs, spread, tmp_path):
    process = runs.launch(tmp_path, *spread, "train.steps=100000", "checkpoint.every=0", processes=2, devices=2)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.1)
    os.kill(children(process)[1], signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    (saved,) = re.findall(r"SIGTERM: saved step (\d+); continue with --resume", said)
    assert Checkpointer(tmp_path, read_only=True).steps() == [int(saved)]
    runs.train(tmp_path, *spread, f"train.steps={int(saved) + 1}", "checkpoint.every=0", resume=True)


@pytest.mark.parametrize(("processes", "kills"), [(2, 1), pytest.param(4, 20, marks=SOAK)])
def test_sigkill_of_any_one_process(runs, spread, two_processes, tmp_path, leaves, rows, processes, kills, seed):
    """The first of every two moments is within a save."""
    whole = two_processes
    shape, longest = {"processes": processes, "devices": 4 // processes}, 60.0
    options = (*spread, "checkpoint.every=1", "checkpoint.keep=2")
    if processes != 2:
        whole, begun = tmp_path / "whole", time.monotonic()
        runs.launched(whole, *options, **shape)
        longest = time.monotonic() - begun
    expected, metrics = leaves(whole), rows(whole)
    chance, moments, run = random.Random(seed), [], 0
    while True:
        out = tmp_path / f"run{run}"
        process = runs.launch(out, *options, **shape, resume=True)
        if len(moments) < kills and (moment := kill_one(process, out, chance, longest, len(moments) % 2 == 0)):
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 128 + signal.SIGKILL, said
            moments.append(moment)
            continue
        said, _ = process.communicate(timeout=HANGS)
        assert process.returncode == 0, said
        found = leaves(out)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], array) for name, array in expected.items())
        assert rows(out) == metrics and not (out / "damaged").exists()
        if len(moments) == kills:
            break
        run += 1
    print(f"{run + 1} runs finished; killed: {'; '.join(moments)}")
    assert any("in a save" in moment for moment in moments)
