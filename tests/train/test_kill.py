"""A training process that is killed again and again ends with the parameters of one that is not."""

import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.train.checkpoint import Checkpointer

OPTIONS = ("checkpoint.every=1", "checkpoint.keep=2", "eval.every=20", "log.every=7")
SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sigkill_at_random_moments(runs, tmp_path, leaves, rows, seed):
    kills, steps = 20, 60
    options = (f"train.steps={steps}", *OPTIONS)
    begun = time.monotonic()
    assert runs.start(tmp_path / "whole", *options, stdout=None, stderr=None).wait() == 0
    whole_run = time.monotonic() - begun
    expected, metrics = leaves(tmp_path / "whole"), rows(tmp_path / "whole")

    chance, done, in_save, run = random.Random(seed), 0, 0, 0
    while done < kills or (tmp_path / f"run{run}").exists() or not run:
        out = tmp_path / f"run{run}"
        process = runs.start(out, *options, resume=True, stdout=None, stderr=None)
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
        assert rows(out) == metrics
        assert not (out / "damaged").exists()
    print(f"{done} kills, {in_save} of them during a save, {run} runs finished, one run takes {whole_run:.1f} s")
    assert in_save > 0


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
        said, _ = process.communicate(timeout=240)
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
