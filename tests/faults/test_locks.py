"""One process has a run, one builds a cache; both where the file system knows no `flock`."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.processes import file_lock
from jaxlm.processes.file_lock import exclusive, hold, only_trainer

NONE = [None, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP]


@pytest.fixture(params=NONE, ids=str)
def file_system(request, monkeypatch):
    def refuse(file, how):
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def test_the_second_trainer_is_refused_by_the_name_of_the_first(tmp_path, file_system):
    run = tmp_path / "a b[1]" / "run"
    with only_trainer(run):
        me = rf"process {os.getpid()} on {socket.gethostname()} has this run"
        with pytest.raises(UserError, match=me), only_trainer(run):
            pass
    with only_trainer(run):
        pass


def test_an_error_inside_frees_the_run_and_keeps_its_name(tmp_path, file_system):
    with pytest.raises(OSError, match="inside"), only_trainer(tmp_path):
        raise OSError(errno.ENOSPC, "inside")
    with only_trainer(tmp_path):
        pass


def test_a_cache_is_built_by_one_after_the_other(tmp_path, file_system):
    inside, most = [], []

    def build():
        with exclusive(tmp_path / "cache" / "abc"):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.pop()

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 6 and max(most) == 1


@pytest.fixture(scope="module")
def dead():
    """What a process that has ended wrote into its lock."""
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return {"process": int(process.stdout), "host": socket.gethostname()}


def test_what_the_dead_have_left_is_taken_away(tmp_path, monkeypatch, dead):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    made = tmp_path / ".lock.made"
    made.write_text(json.dumps(dead))
    with hold(tmp_path / ".lock", wait=False):
        pass
    made.write_text(json.dumps(dead | {"host": "another"}))
    with pytest.raises(UserError, match="on another has this run"), hold(tmp_path / ".lock", wait=False):
        pass


def test_one_that_was_killed_while_it_removed_a_lock_blocks_nobody(tmp_path, monkeypatch, dead):
    """Its file is taken away when it is old; a new one says that a process is at it."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    (tmp_path / ".lock.made").write_text(json.dumps(dead))
    removal = tmp_path / ".lock.made.removal"
    removal.touch()
    with pytest.raises(UserError, match="has this run"), hold(tmp_path / ".lock", wait=False):
        pass
    long_ago = removal.stat().st_mtime - file_lock.REMOVAL_SECONDS - 1
    os.utime(removal, (long_ago, long_ago))
    with hold(tmp_path / ".lock", wait=False):
        assert not removal.exists()


@pytest.mark.parametrize("look", [1, 2])
def test_two_that_find_a_dead_lock_do_not_both_get_it(tmp_path, monkeypatch, look, dead):
    """Another process takes the lock between a look of the first one and the step that follows from it."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    (tmp_path / ".lock.made").write_text(json.dumps(dead))
    is_dead, looks, holders = file_lock._left_by_the_dead, [], []
    another = hold(tmp_path / ".lock", wait=False)

    def then_another_comes(path):
        answer = is_dead(path)
        looks.append(answer)
        if len(looks) == look:
            monkeypatch.setattr(file_lock, "_left_by_the_dead", is_dead)
            with contextlib.suppress(UserError):
                another.__enter__()
                holders.append("another")
        return answer

    monkeypatch.setattr(file_lock, "_left_by_the_dead", then_another_comes)
    with contextlib.suppress(UserError), hold(tmp_path / ".lock", wait=False):
        holders.append("first")
        assert len(holders) == 1
    assert holders == (["another"] if look == 1 else ["first"])
    assert sorted(path.name for path in tmp_path.iterdir() if "removal" in path.name) == []


@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["takes", "leaves", "dies"])), max_size=24),
    no_locks=st.booleans(),
)
def test_whoever_comes_and_goes_one_has_it(tmp_path_factory, dead, moves, no_locks):
    """Four trainers take, leave, or die holding the lock, in any order."""
    folder, holder, corpses = tmp_path_factory.mktemp("lock"), None, []
    with pytest.MonkeyPatch.context() as patch:
        if no_locks:
            patch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSYS, "none")))
        for who, does in moves:
            if holder is None:
                lock = hold(folder / ".lock", wait=False)
                lock.__enter__()
                holder = who
            elif who == holder and does == "dies" and no_locks:  # nothing of it runs any more
                (folder / ".lock.made").write_text(json.dumps(dead))
                corpses.append(lock)
                holder = None
            elif who == holder and does != "takes":  # by `flock` a dead process leaves as others do
                lock.__exit__(None, None, None)
                holder = None
            else:
                with pytest.raises(UserError, match="has this run"), hold(folder / ".lock", wait=False):
                    pass
        if holder is not None:
            lock.__exit__(None, None, None)
        with hold(folder / ".lock", wait=False):
            pass
