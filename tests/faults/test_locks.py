"""One process has a run, one builds a cache; both where the file system knows no `flock`."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from jaxlm.errors import UserError
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


def test_what_the_dead_have_left_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    made = tmp_path / ".lock.made"
    made.write_text(json.dumps({"process": int(dead.stdout), "host": socket.gethostname()}))
    with hold(tmp_path / ".lock", wait=False):
        pass
    made.write_text(json.dumps({"process": int(dead.stdout), "host": "another"}))
    with pytest.raises(UserError, match="on another has this run"), hold(tmp_path / ".lock", wait=False):
        pass
