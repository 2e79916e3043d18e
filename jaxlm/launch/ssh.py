"""A run on hosts that ssh reaches: `launch local`, of which each process is a connection to its host.

    jaxlm launch ssh hosts --restarts 20 -- train configs/quickstart.toml

A host that receives a stop signal, or whose connection breaks, must not go on by itself: what runs there ends when its
standard input does.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.errors import UserError
from jaxlm.launch.job import FOLDER_PATH, checked
from jaxlm.launch.local import launch

HOST = r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*"
OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
REMOTE = """
exec 3<&0
cd {folder} || exit 2
env {environment} {command} < /dev/null 3<&- &
run=$!
{{
    cat
    kill -TERM $run
    sleep {grace}
    kill -KILL $run
}} <&3 > /dev/null 2>&1 3<&- &
watch=$!
exec 3<&-
wait $run
code=$?
kill $watch 2> /dev/null
exit $code
"""
"""For a POSIX shell: when standard input ends, the command receives SIGTERM, and is killed if it does not leave."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """How the hosts are reached, and what is started there."""

    hosts: Path
    """A host a line, as ssh takes it; one that stands there several times gets as many processes, one for each GPU."""
    coordinator: str = ""
    """Process 0's address as the others reach it; empty: the first host as it is written."""
    python: str = ""
    """An interpreter there that has jaxlm; empty: `jaxlm`."""
    folder: str = ""
    """Where to start; empty: the folder that is current here."""
    ssh: str = "ssh"
    """The command, with options of its own."""
    grace: int = 300
    """Seconds from SIGTERM to SIGKILL."""


def launch_remotely(remote: Remote, words: Sequence[str], *, restarts: int, logs: Path) -> int:
    """Run `jaxlm WORDS` on all hosts, its output prefixed here; returns the exit code, as `local.launch`.

    Raises:
        UserError: no hosts, a host that is no name, or no verb.
    """
    count = len(read_hosts(remote.hosts))
    if not words:
        raise UserError("nothing to launch", "jaxlm launch ssh HOSTS -- train CONFIG")
    verb = [*words, "--resume"] if words[0] == "train" and "--resume" not in words else list(words)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(remote).items() if value]
    options.remove(f"--hosts={remote.hosts}")
    child = ["launch", "on-host", str(remote.hosts), *options, "--", *verb]
    return launch(child, processes=count, restarts=restarts, grace=remote.grace + 30.0, logs=logs)


def on_host(remote: Remote, words: Sequence[str], environment: Mapping[str, str] = os.environ) -> int:
    """Run one of the processes on its host until it ends or this process is stopped; returns its exit code."""
    hosts = read_hosts(remote.hosts)
    index = int(environment.get("JAXLM_PROCESS_ID", "0"))
    command = [*shlex.split(remote.ssh), *OPTIONS, hosts[index], command_line(remote, hosts, index, words, environment)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def stop(number: int, frame: object) -> None:
        if process.stdin:
            process.stdin.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    code = process.wait()
    if code == 255:
        print(f"ssh {hosts[index]}: the connection failed or broke", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


def command_line(
    remote: Remote, hosts: Sequence[str], index: int, words: Sequence[str], environment: Mapping[str, str]
) -> str:
    """What the shell of host `index` is given."""
    address = checked("--coordinator", remote.coordinator or hosts[0].rpartition("@")[2], r"[A-Za-z0-9][A-Za-z0-9.:-]*")
    port = environment.get("JAXLM_COORDINATOR", ":0").rpartition(":")[2]  # a new one for each start
    variables = {
        "JAXLM_COORDINATOR": f"{address}:{port}",
        "JAXLM_PROCESSES": len(hosts),
        "JAXLM_PROCESS_ID": index,
        "JAXLM_HOSTS": len(set(hosts)),
    }
    if hosts.count(hosts[index]) > 1:
        variables["JAX_LOCAL_DEVICE_IDS"] = hosts[:index].count(hosts[index])
    jaxlm = [checked("--python", remote.python, FOLDER_PATH), "-m", "jaxlm"] if remote.python else ["jaxlm"]
    return REMOTE.format(
        folder=shlex.quote(remote.folder or str(Path.cwd())),
        environment=shlex.join(f"{name}={value}" for name, value in variables.items()) if len(hosts) > 1 else "",
        command=shlex.join([*jaxlm, *words]),
        grace=remote.grace,
    )


def read_hosts(path: Path) -> list[str]:
    """The hosts of a file; what follows `#` is a comment.

    Raises:
        UserError: it cannot be read, is empty, or a line is no host.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", "a file with a host on each line") from None
    hosts = [checked(f"{path}: the host", line, HOST) for line in lines if line]
    if not hosts:
        raise UserError(f"{path}: no hosts", "a file with a host on each line")
    return hosts
