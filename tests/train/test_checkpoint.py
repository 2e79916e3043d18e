"""Which checkpoints are kept, what damage does, and what a full disk does."""

import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.train.checkpoint import Checkpointer, checksums, under_way_gb
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import TrainState, init_state


@pytest.fixture(scope="module")
def optimizer():
    return make_optimizer(config.Train())


def make_state(optimizer, step: int, width: int = 3) -> TrainState:
    params = {"a": {"kernel": jnp.arange(2.0 * width).reshape(2, width) + step}, "b": {"scale": jnp.ones(5)}}
    return init_state(params, optimizer)._replace(step=jnp.asarray(step, jnp.int32))


def saved(folder: Path, optimizer, steps, keep: int = 3, losses=None) -> list[int]:
    """Save these steps, and tell which are still there."""
    checkpointer = Checkpointer(folder, keep)
    for step in steps:
        checkpointer.save(make_state(optimizer, step), {"data": step}, losses[step] if losses else None)
    checkpointer.close()
    return Checkpointer(folder, read_only=True).steps()


def test_the_newest_and_the_best_are_kept(tmp_path, optimizer):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6}
    assert saved(tmp_path / "a", optimizer, range(1, 6), keep=2, losses=losses) == [2, 4, 5]
    assert saved(tmp_path / "b", optimizer, range(1, 6), keep=2) == [4, 5]
    # the best is remembered by the next process
    assert saved(tmp_path / "a", optimizer, [6, 7], keep=1, losses={6: 1.5, 7: 1.1}) == [2, 7]


def test_a_save_leaves_preemptions_to_the_loop(tmp_path, optimizer, monkeypatch):
    """Orbax asks with the number of the step: a notice that comes then is for a point that is over."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or False)
    assert saved(tmp_path, optimizer, [1, 2]) == [1, 2] and asked == []


def test_a_state_returns_bit_for_bit(tmp_path, optimizer):
    saved(tmp_path, optimizer, [1, 2])
    state, run = Checkpointer(tmp_path).restore(make_state(optimizer, 0), pytest.fail)
    assert run["data"] == 2
    jax.tree.map(np.testing.assert_array_equal, state, make_state(optimizer, 2))


def test_the_largest_leaf_fits_under_the_limit():
    assert under_way_gb({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}) == 2
    assert under_way_gb({"x": jax.ShapeDtypeStruct((1100, 1_000_000), jnp.float32)}) == 6  # for 4.4 GB


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, empty])
def test_damage_in_any_file_is_noticed_or_harmless(tmp_path, optimizer, damage):
    saved(tmp_path / "whole", optimizer, [1, 2])
    newest = tmp_path / "whole" / "checkpoints" / "2"
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    noticed = []
    for file in files:
        run, warnings = tmp_path / "run", []
        shutil.copytree(tmp_path / "whole", run)
        damage(run / "checkpoints" / "2" / file)
        state, record = Checkpointer(run).restore(make_state(optimizer, 0), warnings.append)
        step = int(state.step)
        jax.tree.map(np.testing.assert_array_equal, state, make_state(optimizer, step))
        assert record["data"] == step and step == (1 if warnings else 2)
        if warnings:
            noticed.append(file)
            assert len(warnings) == 1 and f"{run / 'checkpoints' / '2'} is damaged: " in warnings[0]
            assert "\n" not in warnings[0]
            assert [path.name.split("-")[0] for path in (run / "damaged").iterdir()] == ["2"]
            assert saved(run, optimizer, [2]) == [1, 2], "the step can be saved again"
            again = Checkpointer(run).restore(make_state(optimizer, 0), pytest.fail)[0]
            assert int(again.step) == 2
        shutil.rmtree(run)
    assert any("params" in file for file in noticed) and any("run" in file for file in noticed)


@pytest.mark.parametrize(("before", "after"), [("params.b.scale", "params.b.scald"), ("1234567", "1234568")])
def test_a_changed_record_is_damage_not_another_architecture(tmp_path, optimizer, before, after):
    checkpointer = Checkpointer(tmp_path)
    for step in (1, 2):
        checkpointer.save(make_state(optimizer, step), {"data": 1234567})
    checkpointer.close()
    record = tmp_path / "checkpoints" / "2" / "run" / "metadata"
    assert before in record.read_text()
    record.write_text(record.read_text().replace(before, after))
    warnings = []
    state, run = Checkpointer(tmp_path).restore(make_state(optimizer, 0), warnings.append)
    assert (int(state.step), run["data"]) == (1, 1234567) and "the checksum of its record differs" in warnings[0]


def test_all_damaged_is_one_error(tmp_path, optimizer):
    saved(tmp_path, optimizer, [1, 2])
    for path in (tmp_path / "checkpoints").rglob("d/*"):
        truncate(path)
    warnings = []
    with pytest.raises(UserError, match="no intact checkpoint"):
        Checkpointer(tmp_path).restore(make_state(optimizer, 0), warnings.append)
    assert len(warnings) == 2 and sorted(Checkpointer(tmp_path).steps()) == [1, 2]


def test_another_architecture_is_refused_by_name(tmp_path, optimizer):
    saved(tmp_path, optimizer, [1])
    with pytest.raises(UserError, match=r"params\.a\.kernel is \[2, 3\], the config asks for \[2, 4\]"):
        Checkpointer(tmp_path).restore(make_state(optimizer, 0, width=4), pytest.fail)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8])
def test_a_flip_of_any_bit_changes_the_checksum(dtype):
    with jax.enable_x64(True):
        x = np.asarray(jnp.arange(1, 4).astype(dtype))
        for bit in range(8 * x.nbytes):
            content = bytearray(x.tobytes())
            content[bit // 8] ^= 1 << bit % 8
            other = np.frombuffer(bytes(content), x.dtype)
            assert checksums({"x": jnp.asarray(x)}) != checksums({"x": jnp.asarray(other)}), bit


def assert_survives(runs, out: Path, line: str) -> None:
    """After a failed save the earlier checkpoints are whole, and the run can go on."""
    assert str(out) in line and ("No space left" in line or "File too large" in line)
    assert runs.start(out, "train.steps=12", resume=True, stdout=None, stderr=None).wait() == 0
    assert not (out / "damaged").exists()


def test_a_write_that_fails_stops_with_one_line(runs, tmp_path, monkeypatch):
    """The system refuses to let a file grow, as it does on a full disk."""
    assert runs.start(tmp_path, "train.steps=3", stdout=None, stderr=None).wait() == 0
    with monkeypatch.context() as patch:
        limited = ("sh", "-c", 'ulimit -f 12; exec "$@"', "sh")  # files of at most 12 blocks of 512 bytes
        command = runs.command
        patch.setattr(runs, "command", lambda *args, **options: [*limited, *command(*args, **options)])
        line = runs.refused(tmp_path, "eval.every=100", resume=True)
    assert [int(path.name) for path in (tmp_path / "checkpoints").glob("*[0-9]")] == [3]
    assert_survives(runs, tmp_path, line)


@pytest.mark.soak
def test_a_full_disk_stops_with_one_line(runs, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    room = "size=1500k"  # for three checkpoints or so: Orbax writes about fifty files each, how many depends on timing
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", room, "tmpfs", str(disk)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        line = runs.refused(
            disk / "run", "checkpoint.keep=100", "checkpoint.every=1", "train.steps=400", "eval.every=0"
        )
        before = sorted(int(path.name) for path in (disk / "run" / "checkpoints").glob("*[0-9]"))
        assert before, line
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert_survives(runs, disk / "run", line)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
