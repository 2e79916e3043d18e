"""A file that one process holds at a time: by `flock`, which the system drops with the process, or by making a file.

Some network file systems know no `flock`. There the lock is a second file, which only one process can make; one that a
dead process of this host has left is taken away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError

REMOVAL_SECONDS = 60.0
"""Removing a lock takes less, clocks of two hosts that differ included."""
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def hold(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path`, whose folder exists.

    Raises:
        UserError: another process holds it and this one does not wait.
        OSError: the file cannot be made.
    """
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise _held(path) from None
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                break
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # its holder has just taken the file away
            file.truncate(0)
            file.write(_me())
            file.flush()
            yield
            return
    with _made(path.with_name(f"{path.name}.made"), wait):
        yield


@contextlib.contextmanager
def only_trainer(run_dir: Path) -> Iterator[None]:
    """Be the one process that trains the run at `run_dir`, or of several the first; a start that fails leaves nothing.

    Raises:
        UserError: another one trains it, or the folder cannot be written.
    """
    lock = run_dir / ".lock"
    with contextlib.ExitStack() as stack:
        made = not run_dir.exists()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold(lock, wait=False))
        except OSError as error:
            raise UserError(f"{run_dir}: cannot be written: {error.strerror}", "choose another out_dir") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if made and not any(run_dir.iterdir()):
                run_dir.rmdir()


@contextlib.contextmanager
def _made(path: Path, wait: bool) -> Iterator[None]:
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(_me())
            break
        except FileExistsError:
            if _take_away_of_the_dead(path):
                continue
            if wait:
                time.sleep(0.1)
            else:
                raise _held(path) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _me() -> str:
    return json.dumps({"process": os.getpid(), "host": socket.gethostname()})


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written
        return {}
    return owner if isinstance(owner, dict) else {}


def _take_away_of_the_dead(path: Path) -> bool:
    """Remove the lock of a dead process; False if its owner lives, or another process is at it.

    A second file lets one process look again and remove at a time: else one that had looked earlier could remove the
    new lock of another that was quicker.
    """
    if not _left_by_the_dead(path):
        return False
    removal = path.with_name(f"{path.name}.removal")
    try:
        removal.open("x").close()
    except FileExistsError:
        return _take_away_old(removal)
    try:
        if _left_by_the_dead(path):
            path.unlink(missing_ok=True)
    finally:
        removal.unlink(missing_ok=True)
    return True


def _take_away_old(removal: Path) -> bool:
    """Remove the file of a process that was killed while it removed a lock; False: one is at it, or has just ended."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - removal.stat().st_mtime > REMOVAL_SECONDS:
            removal.unlink()
            return True
    return False


def _left_by_the_dead(path: Path) -> bool:
    owner = _owner(path)
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("process"), int):
        return False
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _held(path: Path) -> UserError:
    owner = _owner(path)
    who = f"process {owner['process']} on {owner['host']}" if owner.keys() >= {"process", "host"} else "another process"
    hint = f"wait for it or end it, or choose another out_dir; if it is long dead, remove {path}"
    return UserError(f"{path.parent}: {who} has this run", hint)


@contextlib.contextmanager
def exclusive(target: Path, option: str = "data.cache_dir") -> Iterator[None]:
    """Hold the lock file beside `target`; turns a full or read-only disk into a `UserError`.

    The system drops the lock with the process, so a killed one blocks nobody.

    Args:
        option: names the folder in the config.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with hold(target.with_suffix(".lock")):
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{target.parent}: the disk is full", f"free space, or choose another {option}") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            where = f"{target.parent}: cannot write here: {error.strerror}"
            raise UserError(where, f"choose another {option}") from None
        raise
