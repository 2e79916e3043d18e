"""A container of docker or podman, from an image that the user names: `--sandbox container:python:3.12-slim`.

Containers share no descriptors with us, so a client here and a relay inside carry all pipes of a box over the standard
streams of `docker run -i`. The image needs a Python 3.11 or newer as `python3`, and nothing of jaxlm.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import sys
from pathlib import Path

from jaxlm.sandbox.backends import INSIDE, LANGUAGES, Backend, Launch, Request, environment, python_command, seccomp
from jaxlm.sandbox.interpreter import Interpreter, ask

ENGINES = ("docker", "podman")
BOX, WORK = "/box", "/jaxlm-work"
"""An image has neither: runc gives a new disk the mode of a folder that lies there already."""
OWN_MEMORY = 32 << 20
"""Bytes for the relay, the worker before its program begins, and what the kernel keeps for their processes."""
CLIENT = Path(__file__).with_name("container_client.py")


@functools.cache
def engine() -> tuple[str, str]:
    """Find an engine that answers. Returns its program, or nothing and the reason."""
    reasons = []
    for name in ENGINES:
        if not (path := shutil.which(name)):
            reasons.append(f"{name} is not installed")
            continue
        asked = ask(path, "version", "--format", "{{.Server.Version}}")
        if asked.returncode == 0:
            return path, ""
        lines = asked.stderr.strip().splitlines()
        reasons.append(f"the engine of {name} does not answer: {lines[-1] if lines else 'no message'}")
    return "", "; ".join(reasons)


@functools.cache
def is_podman(program: str) -> bool:
    """Whether an engine is podman, by whatever name: some systems call it docker, by a script or a link."""
    linked = os.path.basename(os.path.realpath(program)) == "podman"  # it then calls itself docker too
    return linked or ask(program, "--version").stdout.startswith("podman")


def image_number(image: str) -> tuple[str, str]:
    """The id of an image that is here. Returns it, or nothing and the reason."""
    program, reason = engine()
    if not program:
        return "", reason
    asked = ask(program, "image", "inspect", "--format", "{{.Id}}", image)
    number = "" if asked.returncode else asked.stdout.strip()
    return number, "" if number else f"no image {image!r} here: {program} pull {image}"


def run_command(program: str, image: str, name: str, request: Request) -> list[str]:
    """The command line of a box."""
    # The files of the box lie in memory too, and its first process is ours.
    memory = str(request.limits.memory + request.limits.disk_bytes + OWN_MEMORY)
    limits = ["--memory", memory, "--memory-swap", memory, "--pids-limit", "40" if request.language == "bash" else "12"]
    # Engines raise these two beyond what they may where they lack the right; the worker lowers them further.
    limits += ["--ulimit", "nofile=256:256", "--ulimit", "nproc=256:256"]
    # The kernel counts processes by user, whatever their container: each box draws one, beyond those of people.
    rights = ["--user", f"{20_000 + secrets.randbelow(40_000)}:65534", "--cap-drop", "ALL"]
    rights += ["--security-opt", "no-new-privileges", "--network", "none", "--ipc", "none", "--hostname", "box"]
    # Podman knows no limit of files, fills a new disk, and lays disks to write on /tmp and so on.
    disk = f"{WORK}:rw,nosuid,nodev,size={request.limits.disk_bytes},mode=1777,"
    podman = is_podman(program)
    files = ["--tmpfs", disk + ("notmpcopyup" if podman else "nr_inodes=1025"), "--read-only"]
    files += ["--read-only-tmpfs=false"] if podman else []
    files += ["-v", f"{INSIDE}:{BOX}/inside:ro", "--workdir", "/"]
    names = {**environment(WORK), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    given = [word for key, value in names.items() for word in ("--env", f"{key}={value}")]
    python, *start = python_command("python3", BOX, "relay", WORK)
    begin = [program, "run", "--rm", "--interactive", "--pull", "never", "--name", name]
    return [*begin, *limits, *rights, *files, *given, "--entrypoint", python, image, *start]


def of(image: str) -> tuple[Backend, Interpreter]:
    """The backend of an image, and the Python in it."""
    number, reason = image_number(image)

    def launch(request: Request) -> Launch:
        program, name = engine()[0], f"jaxlm-box-{secrets.token_hex(8)}"
        client = [sys.executable, "-S", "-P", "-B", str(CLIENT), str(request.job), str(request.info)]
        return Launch(
            command=(*client, *run_command(program, image, name, request)),
            work=WORK,
            readable=("/usr", "/lib", "/opt", BOX, "/dev", "/proc"),
            filters=seccomp.filters(request.language),
            measures=True,
            end=(program, "rm", "--force", name),
            environment=dict(os.environ),  # of the client: engines look for HOME, XDG_RUNTIME_DIR, DOCKER_HOST
        )

    backend = Backend(f"container:{image}", lambda: reason, launch, languages=LANGUAGES)
    return backend, Interpreter("python3", (), number)
