"""A training process that is killed again and again ends with the parameters of one that is not."""

import random
import time

import numpy as np
import pytest

OPTIONS = ("checkpoint.every=1", "checkpoint.keep=2", "eval.every=20", "log.every=7")
SOAK = [pytest.mark.soak, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(("kills", "steps"), [(2, 12), pytest.param(20, 60, marks=SOAK)])
def test_sigkill_at_random_moments(runs, tmp_path, leaves, rows, kills, steps, seed):
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
    if kills >= 20:
        assert in_save > 0
