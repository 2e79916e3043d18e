"""What a judge leaves that was killed: folders of its boxes, and processes that bubblewrap had just begun.

Both bear the number of their judge and its place, and the next judge of the same user there removes them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import secrets
import signal
import stat
import tempfile
from pathlib import Path

_PREFIX = "jaxlm-box-"


def owner() -> str:
    """The name of what belongs to this judge: its process number, and the place in which that counts."""
    return f"{_PREFIX}{os.getpid()}-{_place()}"


@functools.cache
def _place() -> str:
    """Our process namespace, and the machine that runs it: a process elsewhere may live though we do not see it.

    A process keeps its namespace as long as it lives.
    The first namespace has the same number on every Linux, and machines may share a folder for temporary files.
    """
    number, booted = 0, ""
    with contextlib.suppress(OSError):  # a Mac has neither
        number = os.stat("/proc/self/ns/pid").st_ino
        booted = Path("/proc/sys/kernel/random/boot_id").read_text()
    return f"{number}.{hashlib.sha256(f'{platform.node()} {booted}'.encode()).hexdigest()[:16]}"


def _is_dead(name: str) -> bool:
    """Whether `name`, made by `owner`, is of this place and its judge is no more."""
    number, _, rest = name.removeprefix(_PREFIX).partition("-")
    if not (name.startswith(_PREFIX) and number.isdigit() and rest.partition("-")[0] == _place()):
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False  # alive, as another user
    return False


def own_folder() -> Path:
    """Make a folder for a box on the machine's disk."""
    return Path(tempfile.mkdtemp(prefix=f"{owner()}-"))


@functools.cache
def sweep() -> None:
    """Remove, once in the life of this judge, what dead judges left."""
    sweep_folders(tempfile.gettempdir())
    end_orphans()


def sweep_folders(place: str) -> None:
    """Remove folders of boxes whose judge is dead: only our own user's, and only of this place."""
    for path in Path(place).glob(f"{_PREFIX}*"):
        try:
            state = path.lstat()
            if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and _is_dead(path.name):
                remove_folder(path)
        except OSError:
            continue  # another judge sweeps it


def end_orphans() -> None:
    """Kill bubblewrap's processes whose judge is dead.

    Its first child waits for its parent before it asks to die with it. Where the parent is killed in between, the child
    waits for ever. The name of the file that holds its job says whose it was.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "comm").read_text() != "bwrap\n" or folder.stat().st_uid != os.getuid():
                continue
            links = (os.readlink(link) for link in (folder / "fd").iterdir())
            names = (link.removeprefix("/memfd:").removesuffix(" (deleted)") for link in links if "/memfd:" in link)
            if any(_is_dead(name) for name in names):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue  # it has ended, or is another user's


def remove_folder(folder: Path) -> None:
    """Remove a folder whatever its permissions and depth: every subfolder is moved to the top before it is emptied."""
    waiting, moved = [str(folder)], 0
    name = secrets.token_hex(8)  # a program may know our process number, but not this
    while waiting:
        path = waiting.pop()
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                moved += 1
                waiting.append(f"{folder}/{name}-{moved}")
                os.chmod(entry.path, stat.S_IRWXU)
                os.rename(entry.path, waiting[-1])
            else:
                os.unlink(entry.path)
        if path != str(folder):
            os.rmdir(path)
    os.rmdir(folder)
