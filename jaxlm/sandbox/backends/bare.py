"""No isolation: limits only. It must be typed, `--sandbox none`, and every number made with it says so."""

from __future__ import annotations

from jaxlm.sandbox.backends import INSIDE, Backend, Launch, Request, python_command


def launch(request: Request) -> Launch:
    """Describe a process with limits and nothing else."""
    command = python_command(request.interpreter.executable, str(INSIDE.parent), "worker", request.job)
    return Launch(command=tuple(command), work=str(request.folder), readable=("/",))


BACKEND = Backend("none", lambda: "", launch, owns_files=False)
